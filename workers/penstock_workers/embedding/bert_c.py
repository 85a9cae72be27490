"""The BERT family's encoder on a row of texts, as one call into `kernels.c`.

The model's own modules give the same: products take longer there, Python between them 2 ms a batch, as
long as all products of a short text, and each step may wait for the interpreter's lock.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from penstock_workers.embedding.bert import read_encoder
from penstock_workers.embedding.c_kernels import HEAD_SIZES, Kernels
from penstock_workers.embedding.row import RowLayout
from penstock_workers.embedding.shared_weights import share

LANES: Final = 16
"""Numbers of float32 in a vector: all widths are multiples."""
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


class BertC:
    """An encoder with weights of its own for products, in bfloat16 and shared; the rest are the model's.

    Whoever makes one compares its vectors with the model's own before trusting it.

    Args:
        transformer: what computes in float32.
        kernels: what computes instead.

    Raises:
        NotImplementedError: the model is of another kind.
    """

    def __init__(self, transformer: Any, kernels: Kernels) -> None:
        self._kernels = kernels
        encoder = read_encoder(transformer)
        dim, n_heads, layers = encoder.dim, encoder.n_heads, encoder.layers
        if dim not in [size * n_heads for size in HEAD_SIZES]:
            raise NotImplementedError("its heads have an unusual size")
        products = [
            linears for layer in layers for linears in (layer.heads, [layer.output], [layer.up], [layer.down])
        ]
        laid = share([tensor for linears in products for tensor in _lay_out(linears)])
        linears = [
            _Linear(weight.data_ptr(), bias.data_ptr(), linears[0].in_features, _n_out(linears))
            for linears, weight, bias in zip(products, laid[::2], laid[1::2], strict=True)
        ]
        tables = (encoder.words, encoder.positions, encoder.types)
        norms = [norm for layer in layers for norm in (layer.output_norm, layer.down_norm)]
        self._kept = [*tables, encoder.norm, *norms, *laid]
        self._encoder = _Encoder(
            (3 * ctypes.c_void_p)(*(table.data_ptr() for table in tables)),
            (3 * ctypes.c_int64)(*map(len, tables)),
            _norm(encoder.norm),
            (_Layer * len(layers))(
                *(
                    _Layer(*linears[4 * i : 4 * i + 4], *map(_norm, norms[2 * i : 2 * i + 2]))
                    for i in range(len(layers))
                )
            ),
            len(layers),
            n_heads,
            dim,
        )

    def hidden(self, row: Mapping[str, Tensor], positions: Tensor, layout: RowLayout) -> Tensor:
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
        )


def _n_out(linears: Sequence[nn.Linear]) -> int:
    return sum(linear.out_features for linear in linears)


def _norm(norm: nn.LayerNorm) -> _Norm:
    return _Norm(norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps)


def _lay_out(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Return weights and biases as `kernels.c` reads them, those of several layers as of one."""
    n_in, n_out = linears[0].in_features, _n_out(linears)
    if n_in % LANES or n_out % LANES:
        raise NotImplementedError("its widths are unusual")
    weight = torch.cat([linear.weight.detach() for linear in linears]).bfloat16()
    weight = nn.functional.pad(weight, (0, 0, 0, -n_out % PANEL))
    weight = weight.view(-1, PANEL, n_in // 2, 2).transpose(1, 2).contiguous()
    bias = torch.cat([linear.bias.detach() for linear in linears])
    return weight, nn.functional.pad(bias, (0, -n_out % PANEL))
