"""A sentence-transformers model's transformer as an OpenVINO graph, on batches that are padded.

On CPUs it is faster than torch in float32, and with long texts: torch writes their scores to memory.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from penstock_workers.embedding.collating import Collator
from penstock_workers.embedding.pooling import pool
from penstock_workers.embedding.tokenizing import Encoded
from penstock_workers.embedding.way import WayName


def is_installed() -> bool:
    """Tell whether the extra `openvino` is installed."""
    return find_spec("openvino") is not None


class Graph:
    """A model's transformer as a graph, then the model's own modules. See `Way`.

    Whoever makes one compares its vectors with the model's own before trusting it: tracing fixes what the
    model's code decides by shapes.

    Args:
        model: The model with its own attention, float32, on the CPU; it is left as it is.
        collator: Makes a padded batch of texts.
        example: Two texts that the graph is traced with.
        is_bfloat16: Compute products in bfloat16; norms and the residual stream stay float32.

    Raises:
        Exception: OpenVINO cannot convert the model's code.
    """

    name: Final[WayName] = "padded, OpenVINO"
    is_padded: Final = True

    def __init__(
        self,
        model: SentenceTransformer,
        collator: Collator,
        example: Sequence[Encoded],
        *,
        is_bfloat16: bool,
    ) -> None:
        self.dtype = "bfloat16" if is_bfloat16 else "float32"
        self.device, self._collator = model.device, collator
        padded = collator.collate(example, self.device)
        openvino = import_module("openvino")
        self._modules, self._keys = list(model), list(padded)
        # It sets up the root logger for itself, which would silence ours.
        root = logging.getLogger()
        level, handlers, filters = root.level, root.handlers[:], root.filters[:]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tracing: the probe finds what they warn of
                graph = openvino.convert_model(
                    _Hidden(self._modules[0], self._keys), example_input=tuple(padded.values())
                )
        finally:
            root.setLevel(level)
            root.handlers[:], root.filters[:] = handlers, filters
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if is_bfloat16 else "f32",
            # Pinned threads of all processes would sit on the first cores: two processes were half as fast.
            "ENABLE_CPU_PINNING": False,
        }
        self._request = openvino.compile_model(graph, "CPU", hints).create_infer_request()

    def embed(self, texts: Sequence[Encoded], features: Mapping[str, Any]) -> Tensor:
        """See `Way.embed`."""
        padded = self._collator.collate(texts, self.device)
        states = self._request.infer([padded[key].numpy() for key in self._keys], share_inputs=True)
        states = torch.from_numpy(states[0])  # its own copy
        return pool(self._modules[1:], {**padded, **features, "token_embeddings": states})

    def close(self) -> None:
        """See `Way.close`."""

    def settle(self) -> None:
        """See `Way.settle`."""


class _Hidden(nn.Module):
    """A model's first module as a function from tensors to a tensor, which tracing wants."""

    def __init__(self, module: nn.Module, keys: list[str]) -> None:
        super().__init__()
        self.module, self._keys = module, keys

    def forward(self, *features: Tensor) -> Tensor:
        hidden: Tensor = self.module(dict(zip(self._keys, features, strict=True)))["token_embeddings"]
        return hidden
