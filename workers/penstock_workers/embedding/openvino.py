"""A sentence-transformers model's transformer as an OpenVINO graph, on batches that are padded.

On processors it beats torch on long texts, whose scores torch writes to memory, and in float32.
"""

import logging
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn


def is_installed() -> bool:
    """Say whether the extra `openvino` is."""
    return find_spec("openvino") is not None


class Compiled:
    """The graph, then the model's own modules.

    Whoever makes one compares its vectors with the model's own before trusting it: tracing fixes what the
    model's code decides by shapes.

    Args:
        model: with its own attention, float32; left as it is.
        example: of a padded batch of two texts.
        is_bfloat16: compute products in bfloat16; norms and the residual stream stay float32.

    Raises:
        Exception: what OpenVINO or the model's code meets in each other.
    """

    def __init__(
        self, model: SentenceTransformer, example: Mapping[str, Tensor], *, is_bfloat16: bool
    ) -> None:
        openvino = import_module("openvino")
        self._modules, self._keys = list(model), list(example)
        # It sets up the root logger for itself, which would silence ours.
        root = logging.getLogger()
        level, handlers, filters = root.level, root.handlers[:], root.filters[:]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tracing: the probe finds what they warn of
                graph = openvino.convert_model(
                    _Hidden(self._modules[0], self._keys), example_input=tuple(example.values())
                )
        finally:
            root.setLevel(level)
            root.handlers[:], root.filters[:] = handlers, filters
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if is_bfloat16 else "f32",
            # Pinned, the threads of all processes sit on the first cores: two were half as fast together.
            "ENABLE_CPU_PINNING": False,
        }
        self._request = openvino.compile_model(graph, "CPU", hints).create_infer_request()

    def embed(self, padded: Mapping[str, Tensor], extra: Mapping[str, Any]) -> Tensor:
        """Embed a padded batch.

        Args:
            padded: features, integers, each of shape (n_texts, n_tokens).
            extra: features of the batch, for pooling.

        Returns:
            float32, shape (n_texts, dim).
        """
        states = self._request.infer([padded[key].numpy() for key in self._keys], share_inputs=True)
        features = {**padded, **extra, "token_embeddings": torch.from_numpy(states[0])}  # its own copy
        for module in self._modules[1:]:
            features = module(features)
        found: Tensor = features["sentence_embedding"]
        return found


class _Hidden(nn.Module):
    """A first module from tensors to tensor, as tracing wants it."""

    def __init__(self, module: nn.Module, keys: list[str]) -> None:
        super().__init__()
        self.module, self._keys = module, keys

    def forward(self, *features: Tensor) -> Tensor:
        hidden: Tensor = self.module(dict(zip(self._keys, features, strict=True)))["token_embeddings"]
        return hidden
