"""A batch of sequences that share a model's forward passes."""

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from penstock_workers.generation.kv_cache import KVCache, RowPrefix, order_without


class Batch:
    """Rows that share forward passes: inputs padded on the left, keys and values in one cache.

    Args:
        model: ready for inference.
        is_mergeable: whether other batches are going to be merged into it; that takes a `KVCache`, which not
            every model can use.

    Attributes:
        lengths: number of tokens that each row has in the cache.
    """

    def __init__(self, model: PreTrainedModel, *, is_mergeable: bool) -> None:
        config = model.config.get_text_config(decoder=True)
        self.lengths: list[int] = []
        self._model = model
        self._cache = KVCache(config) if is_mergeable else DynamicCache(config=config)
        self._width = 0
        self._parameters = set(inspect.signature(model.forward).parameters)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token of a row takes in the cache."""
        return self._cache.bytes_per_token if isinstance(self._cache, KVCache) else 0

    @property
    def n_slots(self) -> int:
        """Token slots that the cache has allocated; 0 where it is not a `KVCache`."""
        return self._cache.n_slots if isinstance(self._cache, KVCache) else 0

    @property
    def n_bytes(self) -> int:
        """Bytes that the cache has allocated; 0 where it is not a `KVCache`."""
        return self._cache.n_bytes if isinstance(self._cache, KVCache) else 0

    @property
    def has_states(self) -> bool:
        """Whether layers keep a state that every token changes, besides or instead of keys and values."""
        return any(self._cache.is_linear)

    @torch.inference_mode()
    def forward(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Run each row's next tokens.

        Args:
            ids: next token ids of each row; of different length only for rows that have no tokens yet, and
                these may be shorter than the others'.

        Returns:
            Logits of the token after them; float32, shape (n_rows, vocab), on the model's device.
        """
        is_first, device = not self._width, self._model.device
        n_new = max(map(len, ids))
        lengths = [n + len(row) for n, row in zip(self.lengths or [0] * len(ids), ids, strict=True)]
        width = self._width + n_new
        padded = torch.tensor([[0] * (n_new - len(row)) + list(row) for row in ids], device=device)
        # A row's own tokens are the last columns; its positions count them, so that padding moves nothing.
        begin = width - torch.tensor(lengths, device=device)[:, None]
        columns = torch.arange(width, device=device)
        # Each model takes some of these: one with ALiBi no positions, a state-space one `cache_params`.
        # The latter has no keys to mask after its prompt, and would mask the new tokens instead.
        masks = is_first or "cache_params" not in self._parameters
        inputs: dict[str, Any] = {
            "attention_mask": (columns >= begin).long() if masks else None,
            "position_ids": (columns[-n_new:] - begin).clamp(min=0),
            "past_key_values": self._cache,
            "cache_params": self._cache,
            "logits_to_keep": 1,
        }
        inputs = {name: value for name, value in inputs.items() if name in self._parameters}
        if isinstance(self._cache, KVCache):
            self._cache.reserve(len(ids), n_new)
        logits: Tensor = self._model(input_ids=padded, use_cache=True, **inputs).logits[:, -1].float()
        if isinstance(self._cache, KVCache):
            self._cache.advance(n_new)
        self.lengths, self._width = lengths, width
        return logits

    def prefix(self, row: int, n_tokens: int) -> RowPrefix:
        """Say where the first tokens of a row are."""
        assert isinstance(self._cache, KVCache)
        return RowPrefix(self._cache, row, self._cache.grid.end - self.lengths[row], n_tokens)

    @torch.inference_mode()
    def copy_prefixes(self, prefixes: Sequence[RowPrefix | None], n_new: int) -> None:
        """Give the rows of an empty batch their first tokens; does nothing if all are None.

        See `KVCache.copy_prefixes`.
        """
        if any(prefixes):
            assert isinstance(self._cache, KVCache)
            self._cache.copy_prefixes(prefixes, n_new)
            self.lengths = [prefix.n_tokens if prefix else 0 for prefix in prefixes]
            self._width = max(self.lengths)

    @torch.inference_mode()
    def expand(self, order: Sequence[int]) -> None:
        """Put the rows of `order` at its places; a row may be at several."""
        self.lengths = [self.lengths[row] for row in order]
        if isinstance(self._cache, KVCache):
            self._cache.expand(order)
        else:
            self._reorder(order)

    @torch.inference_mode()
    def merge(self, other: "Batch") -> None:
        """Take over the rows of another batch, behind our own; it is not to be used again."""
        assert isinstance(self._cache, KVCache)
        assert isinstance(other._cache, KVCache)
        self._cache.merge(other._cache)
        self.lengths += other.lengths
        self._width = max(self._width, other._width)

    @torch.inference_mode()
    def drop(self, gone: Collection[int]) -> list[int]:
        """Drop rows, not all of them; return which row is now at which place."""
        order = order_without(len(self.lengths), gone)
        self.lengths = [self.lengths[row] for row in order]
        if isinstance(self._cache, KVCache):
            self._width = max(self.lengths)
            self._cache.compact(order, self._width)
        else:
            self._reorder(order)
        return order

    def _reorder(self, order: Sequence[int]) -> None:
        # Not `batch_select_indices`: layers with a recurrent state have none, and all can be reordered.
        self._cache.reorder_cache(torch.tensor(order, device=self._model.device))  # type: ignore[arg-type]  # annotated with the legacy LongTensor
