"""A sentence-transformers model on texts laid end to end: no padding in its products."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from penstock_workers.embedding.attention import PACKED, packed
from penstock_workers.embedding.positions import first_position
from penstock_workers.embedding.row import RowLayout
from penstock_workers.embedding.tokenizing import Encoded, gather
from penstock_workers.hardware.copies import upload


class FusedEncoder(Protocol):
    """What computes a transformer in place of its own modules."""

    def hidden(self, row: Mapping[str, Tensor], positions: Tensor, layout: RowLayout) -> Tensor:
        """Return the last hidden states, float32, shape (n_tokens, dim); see `bert_c.BertC`."""


class Packed:
    """The transformer on one row of tokens, then the model's own modules on rectangles of texts.

    Only for a model whose attention comes through transformers' registry and whose positions can be given;
    whoever makes one compares its vectors with the model's own before trusting it.

    Raises:
        NotImplementedError: the model is of another kind; it was left as it is.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        self._modules = list(model)
        self._transformer: Any = getattr(self._modules[0], "auto_model", None)
        if self._transformer is None:
            raise NotImplementedError("its first module is no transformer")
        # A model that knows only eager attention would silently get masks of the wrong kind.
        self._before: str = self._transformer.config._attn_implementation
        if self._before != "sdpa":
            raise NotImplementedError(f"its attention is {self._before}")
        self._accepts = set(inspect.signature(self._transformer.forward).parameters)
        if "position_ids" not in self._accepts:
            raise NotImplementedError("it takes no positions")
        self._first = first_position(self._transformer)
        self._n_batches = self._n_unsafe = 0
        self._fused: FusedEncoder | None = None
        self._transformer.set_attn_implementation(PACKED)

    def undo(self) -> None:
        """Give the model its own attention back."""
        self._transformer.set_attn_implementation(self._before)

    def fuse(self, make: Callable[[Any], FusedEncoder]) -> Callable[[], None]:
        """Have the transformer computed otherwise from now on; returns what undoes it.

        Args:
            make: makes what computes from the transformer.

        Raises:
            NotImplementedError: it is of a kind that is not known.
        """
        transformer = self._transformer
        fused = make(transformer)
        # its weights in float32 are not needed any more, and go with what undoes this
        encoder, transformer.encoder = transformer.encoder, nn.Identity()
        self._fused = fused

        def undo() -> None:
            transformer.encoder, self._fused = encoder, None

        return undo

    def embed(self, texts: Sequence[Encoded], extra: Mapping[str, Any]) -> Tensor:
        """Embed a batch.

        Args:
            texts: at least one token each.
            extra: features of the batch, for pooling.

        Returns:
            The model's dtype and device, shape (n_texts, dim).

        Raises:
            NotImplementedError: attention did not come by the registry, or wants what a row cannot give.
        """
        order = sorted(range(len(texts)), key=lambda i: texts[i].n_tokens)
        device = self._transformer.device
        texts = [texts[i] for i in order]
        lengths = [text.n_tokens for text in texts]
        # A model with scores beyond the quick exponentials' range soon goes without them.
        is_exact = self._n_unsafe * 4 > self._n_batches
        layout = RowLayout(lengths, device, is_exact=is_exact)
        rows = {key: gather(texts, key) for key in texts[0].rows if key != "attention_mask"}
        positions = self._positions(rows.get("input_ids"), lengths)
        row = {key: upload(value, device) for key, value in rows.items()}
        found = self._embed(row, positions, layout, extra)
        self._n_batches += 1
        if not layout.is_safe():
            self._n_unsafe += 1
            found = self._embed(row, positions, RowLayout(lengths, device, is_exact=True), extra)
        back = torch.empty(len(order), dtype=torch.int64)
        back[order] = torch.arange(len(order))
        return found[upload(back, device)]

    def _positions(self, ids: Tensor | None, lengths: Sequence[int]) -> Tensor:
        """Return each token's position in its text, as the model's own code counts; on the processor."""
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
        self, row: Mapping[str, Tensor], positions: Tensor, layout: RowLayout, extra: Mapping[str, Any]
    ) -> Tensor:
        if self._fused is not None:
            hidden = self._fused.hidden(row, positions, layout)
        else:
            hidden = self._hidden(row, upload(positions, layout.device), layout)
        found: list[Tensor] = []
        for part in layout.pooled:
            real = torch.ones(1, 1, dtype=torch.int64, device=layout.device).expand(part.n_texts, part.length)
            features: dict[str, Any] = {
                **extra,
                **{key: part.pad(value) for key, value in row.items()},
                "token_embeddings": part.pad(hidden),
                "attention_mask": real if part.real is None else part.real.long(),
            }
            for module in self._modules[1:]:
                features = module(features)
            found.append(features["sentence_embedding"])
        return torch.cat(found)

    def _hidden(self, row: Mapping[str, Tensor], positions: Tensor, layout: RowLayout) -> Tensor:
        """Return the transformer's hidden states, shape (n_tokens, dim)."""
        features: dict[str, Any] = {key: value[None] for key, value in row.items() if key in self._accepts}
        features["position_ids"] = positions[None]
        if "use_cache" in self._accepts:
            features["use_cache"] = False
        with packed(layout):
            hidden: Tensor = self._modules[0](features)["token_embeddings"][0]
        if not layout.n_calls:
            raise NotImplementedError("its attention does not come by the registry")
        return hidden
