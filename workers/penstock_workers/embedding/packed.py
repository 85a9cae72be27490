"""A sentence-transformers model on texts laid end to end: no padding in its products."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from penstock_workers.embedding.attention import PACKED, packed
from penstock_workers.embedding.pooling import pool_row
from penstock_workers.embedding.positions import first_position
from penstock_workers.embedding.row import RowLayout
from penstock_workers.embedding.tokenizing import Encoded, gather
from penstock_workers.embedding.way import WayName
from penstock_workers.hardware.copies import upload


class RowEncoder(Protocol):
    """Computes a transformer in place of its own modules."""

    @property
    def dtype(self) -> str:
        """Return the format of the factors of products."""

    def hidden(self, row: Mapping[str, Tensor], positions: Tensor, layout: RowLayout) -> Tensor:
        """Return the last hidden states, float32, shape (n_tokens, dim); see `bert_c.BertC`."""


class Packed:
    """The transformer on one row of tokens, then the model's own modules on rectangles of texts. See `Way`.

    Only for a model whose attention comes through transformers' registry and whose positions can be given;
    whoever makes one compares its vectors with the model's own before trusting it.

    Args:
        model: The model; it gets another attention.
        dtype: Format of the model's weights.

    Attributes:
        transformer: The model's transformer.

    Raises:
        NotImplementedError: The model is of another kind; it was left as it is.
    """

    name: Final[WayName] = "packed"
    is_padded: Final = False

    def __init__(self, model: SentenceTransformer, *, dtype: str = "float32") -> None:
        self.dtype = dtype
        self._modules = list(model)
        self.transformer: Any = getattr(self._modules[0], "auto_model", None)
        if self.transformer is None:
            raise NotImplementedError("its first module is no transformer")
        # A model that knows only eager attention would silently get masks of the wrong kind.
        self._before: str = self.transformer.config._attn_implementation
        if self._before != "sdpa":
            raise NotImplementedError(f"its attention is {self._before}")
        self._accepts = set(inspect.signature(self.transformer.forward).parameters)
        if "position_ids" not in self._accepts:
            raise NotImplementedError("it takes no positions")
        self._first = first_position(self.transformer)
        self.device: torch.device = self.transformer.device
        self._n_batches = self._n_unsafe = 0
        self.transformer.set_attn_implementation(PACKED)

    def close(self) -> None:
        """Give the model its own attention back."""
        self.transformer.set_attn_implementation(self._before)

    def settle(self) -> None:
        """See `Way.settle`."""

    def embed(self, texts: Sequence[Encoded], features: Mapping[str, Any]) -> Tensor:
        """See `Way.embed`.

        Raises:
            NotImplementedError: Attention did not come by the registry, or wants what a row cannot give.
        """
        return self.embed_by(self, texts, features)

    def embed_by(self, encoder: RowEncoder, texts: Sequence[Encoded], features: Mapping[str, Any]) -> Tensor:
        """Embed a batch whose hidden states an encoder computes; see `embed`."""
        order = sorted(range(len(texts)), key=lambda i: texts[i].n_tokens)
        device = self.device
        texts = [texts[i] for i in order]
        lengths = [text.n_tokens for text in texts]
        # A model with scores beyond the quick exponentials' range soon goes without them.
        is_exact = self._n_unsafe * 4 > self._n_batches
        layout = RowLayout(lengths, device, is_exact=is_exact)
        rows = {key: gather(texts, key) for key in texts[0].rows if key != "attention_mask"}
        positions = self._positions(rows.get("input_ids"), lengths)
        row = {key: upload(value, device) for key, value in rows.items()}
        found = self._embed(encoder, row, positions, layout, features)
        self._n_batches += 1
        if not layout.is_safe():
            self._n_unsafe += 1
            layout = RowLayout(lengths, device, is_exact=True)
            found = self._embed(encoder, row, positions, layout, features)
        back = torch.empty(len(order), dtype=torch.int64)
        back[order] = torch.arange(len(order))
        return found[upload(back, device)]

    def _positions(self, ids: Tensor | None, lengths: Sequence[int]) -> Tensor:
        """Return each token's position in its text, as the model's own code counts; on the CPU."""
        each = torch.tensor(lengths)
        starts = each.cumsum(0) - each
        padding = self._first - 1
        if ids is not None and padding >= 0 and bool((is_padding := ids == padding).any()):
            # Padding that stands in a text has the padding's position, and is not counted.
            real = (~is_padding).long()
            counted = real.cumsum(0)
            before = (counted - real)[starts]
            return (counted - before.repeat_interleave(each)) * real + padding
        return torch.arange(int(each.sum())) - (starts - self._first).repeat_interleave(each)

    def _embed(
        self,
        encoder: RowEncoder,
        row: Mapping[str, Tensor],
        positions: Tensor,
        layout: RowLayout,
        extra: Mapping[str, Any],
    ) -> Tensor:
        """Return the vectors in the order of the row, shape (n_texts, dim)."""
        return pool_row(self._modules[1:], encoder.hidden(row, positions, layout), row, layout, extra)

    def hidden(self, row: Mapping[str, Tensor], positions: Tensor, layout: RowLayout) -> Tensor:
        """Return the last hidden states by the transformer's own modules; see `RowEncoder.hidden`."""
        features: dict[str, Any] = {key: value[None] for key, value in row.items() if key in self._accepts}
        features["position_ids"] = upload(positions, layout.device)[None]
        if "use_cache" in self._accepts:
            features["use_cache"] = False
        with packed(layout):
            hidden: Tensor = self._modules[0](features)["token_embeddings"][0]
        if not layout.n_calls:
            raise NotImplementedError("its attention does not come by the registry")
        return hidden


class PackedBert:
    """A packed way whose encoder is computed otherwise than by its own modules. See `Way`.

    Args:
        packed: The packed way; its transformer loses its encoder.
        make: Makes what computes the encoder from the transformer.

    Raises:
        NotImplementedError: The transformer is of another kind; it was left as it is.
    """

    name: Final[WayName] = "packed"
    is_padded: Final = False

    def __init__(self, packed: Packed, make: Callable[[Any], RowEncoder]) -> None:
        self._packed, self.device = packed, packed.device
        transformer = packed.transformer
        self.encoder: RowEncoder | None = (encoder := make(transformer))
        self.dtype = encoder.dtype
        self._own, transformer.encoder = transformer.encoder, nn.Identity()

    def embed(self, texts: Sequence[Encoded], features: Mapping[str, Any]) -> Tensor:
        """See `Way.embed`."""
        assert self.encoder is not None
        return self._packed.embed_by(self.encoder, texts, features)

    def close(self) -> None:
        """Give the transformer its own encoder back; the packed way stays in use."""
        if self._own is not None:
            self._packed.transformer.encoder = self._own
        self._own = self.encoder = None

    def settle(self) -> None:
        """Free the transformer's own encoder: most of its weights in float32."""
        self._own = None
