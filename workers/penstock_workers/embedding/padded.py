"""The model's own modules on padded batches, pooling too: the way that all others are compared with."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from penstock_workers.embedding.collating import Collator
from penstock_workers.embedding.tokenizing import Encoded
from penstock_workers.embedding.way import WayName


class Padded:
    """A model as it was loaded. See `Way`.

    Args:
        model: The model; it is left as it is.
        collator: Makes a padded batch of texts.
        dtype: Format of the model's weights.
        is_one_by_one: Compute each text alone, since padding changes its vector.
    """

    name: Final[WayName] = "padded"
    is_padded: Final = True

    def __init__(
        self,
        model: SentenceTransformer,
        collator: Collator,
        *,
        dtype: str = "float32",
        is_one_by_one: bool = False,
    ) -> None:
        self._model, self._collator, self.device = model, collator, model.device
        self.dtype, self._is_one_by_one = dtype, is_one_by_one

    def embed(self, texts: Sequence[Encoded], features: Mapping[str, Any]) -> Tensor:
        """See `Way.embed`."""
        groups = [[text] for text in texts] if self._is_one_by_one else [texts]
        parts = [self._model({**self._collator.collate(group, self.device), **features}) for group in groups]
        return torch.cat([part["sentence_embedding"] for part in parts])

    def close(self) -> None:
        """See `Way.close`."""

    def settle(self) -> None:
        """See `Way.settle`."""
