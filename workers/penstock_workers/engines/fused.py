"""The BERT family's encoder on a row of texts, as one call into `kernels.c`.

The model's own modules give the same: products take longer there, Python between them 2 ms a batch, as
long as all products of a short text, and each step may wait for the interpreter's lock.
"""

import ctypes
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from penstock_workers.engines.attention import Layout
from penstock_workers.engines.kernels import HEAD_SIZES, LANES, Kernels

PANEL: Final = 64
"""Outputs of a Linear layer that are computed at once, and so lie together."""


class _Linear(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n_in", ctypes.c_int64),
        ("n_out", ctypes.c_int64),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_float))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("heads", _Linear),
        ("output", _Linear),
        ("up", _Linear),
        ("down", _Linear),
        ("output_norm", _Norm),
        ("down_norm", _Norm),
    )


class _Encoder(ctypes.Structure):
    _fields_ = (
        ("tables", 3 * ctypes.c_void_p),
        ("n_entries", 3 * ctypes.c_int64),
        ("norm", _Norm),
        ("layers", ctypes.POINTER(_Layer)),
        ("n_layers", ctypes.c_int64),
        ("n_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
    )


class Fused:
    """An encoder with weights of its own for products, in bfloat16; the rest are the model's.

    Whoever makes one compares its vectors with the model's own before trusting it.

    Args:
        transformer: what computes in float32.
        kernels: what computes instead.

    Raises:
        NotImplementedError: the model is of another kind.
    """

    def __init__(self, transformer: Any, kernels: Kernels) -> None:
        self._kernels = kernels
        self._kept: list[Tensor] = []
        try:
            embeddings = transformer.embeddings
            tables = [
                getattr(embeddings, name).weight.detach()
                for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
            ]
            self._dim, self._n_heads = tables[0].shape[1], int(transformer.config.num_attention_heads)
            norm = self._norm(embeddings.LayerNorm)
            layers = [self._layer(layer) for layer in transformer.encoder.layer]
        except AttributeError as error:
            raise NotImplementedError(f"it is built differently: {error}") from error
        if self._dim // self._n_heads not in HEAD_SIZES or not layers:
            raise NotImplementedError("its heads have an unusual size, or it has no layers")
        if not all(table.is_contiguous() and table.dtype == torch.float32 for table in tables):
            raise NotImplementedError("its tables are not plain float32")
        self._kept += tables
        self._n_inner = layers[0].up.n_out
        self._encoder = _Encoder(
            (3 * ctypes.c_void_p)(*(table.data_ptr() for table in tables)),
            (3 * ctypes.c_int64)(*map(len, tables)),
            norm,
            (_Layer * len(layers))(*layers),
            len(layers),
            self._n_heads,
            self._dim,
        )

    def hidden(self, row: Mapping[str, Tensor], positions: Tensor, layout: Layout) -> Tensor:
        """Return the last hidden states.

        Args:
            row: features of the texts, integers, each of shape (n_tokens,).
            positions: of each token in its text, int64, shape (n_tokens,).
            layout: where texts lie in the row.

        Returns:
            float32, shape (n_tokens, dim).

        Raises:
            IndexError: a token or position is not in the model's tables.
        """
        words = row["input_ids"].long()
        types = row["token_type_ids"].long() if "token_type_ids" in row else torch.zeros_like(words)
        return self._kernels.encode(
            self._encoder,
            words,
            positions,
            types,
            layout.ends,
            longest=layout.longest,
            dim=self._dim,
            n_heads=self._n_heads,
            n_inner=self._n_inner,
        )

    def _layer(self, layer: Any) -> _Layer:
        attention, up, dim = layer.attention, layer.intermediate, self._dim
        if not isinstance(up.intermediate_act_fn, GELUActivation):
            raise NotImplementedError("its activation is not GELU")
        n_inner = up.dense.weight.shape[0]
        return _Layer(
            self._linear(dim, dim, attention.self.query, attention.self.key, attention.self.value),
            self._linear(dim, dim, attention.output.dense),
            self._linear(dim, n_inner, up.dense),
            self._linear(n_inner, dim, layer.output.dense),
            self._norm(attention.output.LayerNorm),
            self._norm(layer.output.LayerNorm),
        )

    def _linear(self, n_in: int, n_out: int, *layers: nn.Linear) -> _Linear:
        """Lay weights out, those of several layers as of one with all their outputs."""
        if (
            not all(
                type(layer) is nn.Linear
                and layer.weight.shape == (n_out, n_in)
                and layer.weight.dtype == torch.float32
                and layer.bias is not None
                for layer in layers
            )
            or n_in % LANES
            or n_out % LANES
        ):
            raise NotImplementedError("its products are of another kind")
        weight = torch.cat([layer.weight.detach() for layer in layers]).bfloat16()
        bias = torch.cat([layer.bias.detach() for layer in layers])
        n_more = -len(weight) % PANEL
        weight = nn.functional.pad(weight, (0, 0, 0, n_more))
        weight = weight.view(-1, PANEL, n_in // 2, 2).transpose(1, 2).contiguous()
        bias = nn.functional.pad(bias, (0, n_more))
        self._kept += weight, bias
        return _Linear(weight.data_ptr(), bias.data_ptr(), n_in, len(layers) * n_out)

    def _norm(self, norm: nn.LayerNorm) -> _Norm:
        is_plain = type(norm) is nn.LayerNorm and norm.weight.shape == (self._dim,) and norm.bias is not None
        if not is_plain or norm.weight.dtype != torch.float32 or self._dim % LANES:
            raise NotImplementedError("its norms are of another kind")
        self._kept += norm.weight, norm.bias
        return _Norm(norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps)
