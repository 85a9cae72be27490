"""A way to compute a model's vectors: what a way is, and how it is run."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.errors import OutOfMemoryError
from penstock_workers.embedding.tokenizing import Encoded
from penstock_workers.hardware.copies import download
from penstock_workers.hardware.device import own_stream

WayName = Literal["packed", "padded", "padded, OpenVINO"]
"""Texts of a batch lie end to end, or are padded to the longest; and who computes, if not torch."""


class Way(Protocol):
    """One way to compute a model's vectors.

    A way may change the model that it was made from: at most one way of a model is in use. See `Packed`,
    `PackedBert`, `Padded`, `Bfloat16` and `openvino.Graph`; `choosing` makes them.
    """

    @property
    def name(self) -> WayName:
        """Return what `ModelInfo.batching` announces."""

    @property
    def dtype(self) -> str:
        """Return the format of matrix products; unless it is float16, everything else is float32."""

    @property
    def is_padded(self) -> bool:
        """Tell whether a batch costs its longest text times their number, or else their sum."""

    @property
    def device(self) -> torch.device:
        """Return where vectors are computed."""

    def embed(self, texts: Sequence[Encoded], features: Mapping[str, Any]) -> Tensor:
        """Embed a batch.

        Args:
            texts: At least one, each of at least one token.
            features: Features of the whole batch, for pooling.

        Returns:
            Floats on `device`, shape (n_texts, dim).
        """

    def close(self) -> None:
        """Give the model back as it was before this way was made."""

    def settle(self) -> None:
        """Free what only `close` would need: the way stays in use."""


@torch.inference_mode()
def compute(way: Way, texts: Sequence[Encoded], name: str) -> NDArray[np.float32]:
    """Embed texts that share a prompt.

    Args:
        way: The way to embed them.
        texts: At least one, each of at least one token.
        name: Name of the model.

    Returns:
        float32, shape (n_texts, dim).

    Raises:
        OutOfMemoryError: The batch did not fit; the way stays usable.
    """
    length = texts[0].prompt_length
    try:
        with own_stream(way.device):
            vectors = way.embed(texts, {} if length is None else {"prompt_length": length})
            found: NDArray[np.float32] = download(vectors.float()).numpy()  # (n_texts, dim)
        return found
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise OutOfMemoryError(name, max(text.n_tokens for text in texts)) from error
