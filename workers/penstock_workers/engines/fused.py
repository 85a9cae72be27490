"""The BERT family's encoder on a row of texts, as one call into `kernels.c`.

The model's own modules give the same: products take longer there, Python between them 2 ms a batch, as
long as all products of a short text, and each step may wait for the interpreter's lock.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from penstock_workers.engines.attention import Layout
from penstock_workers.engines.kernels import HEAD_SIZES, Kernels
from penstock_workers.engines.weights import share

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


class Fused:
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
        try:
            embeddings, layers = transformer.embeddings, list(transformer.encoder.layer)
            tables = [
                getattr(embeddings, name).weight.detach()
                for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
            ]
            self._dim, n_heads = tables[0].shape[1], int(transformer.config.num_attention_heads)
            self._n_inner = layers[0].intermediate.dense.out_features if layers else 0
            norms = [embeddings.LayerNorm]
            for layer in layers:
                norms += [layer.attention.output.LayerNorm, layer.output.LayerNorm]
            # weights and biases of the four products of each layer
            laid = [tensor for layer in layers for tensor in self._lay_out_layer(layer)]
        except AttributeError as error:
            raise NotImplementedError(f"it is built differently: {error}") from error
        if self._dim not in [size * n_heads for size in HEAD_SIZES] or not layers:
            raise NotImplementedError("its heads have an unusual size, or it has no layers")
        if not all(_is_table(table, self._dim) for table in tables):
            raise NotImplementedError("its tables are not plain float32")
        if not all(_is_plain(norm, self._dim) for norm in norms):
            raise NotImplementedError("its norms are of another kind")
        laid = share(laid)
        self._kept = [*tables, *norms, *laid]
        sizes = self._sizes * len(layers)
        linears = [
            _Linear(weight.data_ptr(), bias.data_ptr(), n_in, n_out)
            for weight, bias, (n_in, n_out) in zip(laid[::2], laid[1::2], sizes, strict=True)
        ]
        first, *others = (_Norm(norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps) for norm in norms)
        self._encoder = _Encoder(
            (3 * ctypes.c_void_p)(*(table.data_ptr() for table in tables)),
            (3 * ctypes.c_int64)(*map(len, tables)),
            first,
            (_Layer * len(layers))(
                *(_Layer(*linears[4 * i : 4 * i + 4], *others[2 * i : 2 * i + 2]) for i in range(len(layers)))
            ),
            len(layers),
            n_heads,
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
        )

    @property
    def _sizes(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's products in the order in which they are computed."""
        dim, n_inner = self._dim, self._n_inner
        return [(dim, 3 * dim), (dim, dim), (dim, n_inner), (n_inner, dim)]

    def _lay_out_layer(self, layer: Any) -> list[Tensor]:
        attention, up = layer.attention, layer.intermediate
        if not isinstance(up.intermediate_act_fn, GELUActivation):
            raise NotImplementedError("its activation is not GELU")
        products = [
            [attention.self.query, attention.self.key, attention.self.value],
            [attention.output.dense],
            [up.dense],
            [layer.output.dense],
        ]
        return [
            tensor
            for linears, size in zip(products, self._sizes, strict=True)
            for tensor in _lay_out(linears, *size)
        ]


def _lay_out(linears: Sequence[nn.Linear], n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    """Return weights and biases as `kernels.c` reads them, those of several layers as of one."""
    shape = n_out // len(linears), n_in
    if n_in % LANES or n_out % LANES or not all(_is_linear(linear, shape) for linear in linears):
        raise NotImplementedError("its products are of another kind")
    weight = torch.cat([linear.weight.detach() for linear in linears]).bfloat16()
    weight = nn.functional.pad(weight, (0, 0, 0, -n_out % PANEL))
    weight = weight.view(-1, PANEL, n_in // 2, 2).transpose(1, 2).contiguous()
    bias = torch.cat([linear.bias.detach() for linear in linears])
    return weight, nn.functional.pad(bias, (0, -n_out % PANEL))


def _is_table(table: Tensor, dim: int) -> bool:
    return table.shape[1] == dim and table.is_contiguous() and table.dtype == torch.float32


def _is_linear(layer: nn.Module, shape: tuple[int, int]) -> bool:
    if type(layer) is not nn.Linear or layer.bias is None:
        return False
    return layer.weight.shape == shape and layer.weight.dtype == torch.float32


def _is_plain(norm: nn.Module, dim: int) -> bool:
    if type(norm) is not nn.LayerNorm or norm.bias is None or dim % LANES:
        return False
    return norm.weight.shape == (dim,) and norm.weight.dtype == torch.float32
