"""The BERT family's encoder on a row of texts, as one call into `kernels_encoder.h`.

The model's own modules give the same. They take longer for products, and Python between them takes 2 ms a
batch: as long as all products of a short text. Each step may also wait for the interpreter's lock.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from penstock_workers.embedding.bert import read_encoder
from penstock_workers.embedding.c_kernels import (
    HEAD_SIZES,
    CEncoder,
    CLayer,
    CLinear,
    Kernels,
    c_norm,
    n_outputs,
)
from penstock_workers.embedding.row import RowLayout
from penstock_workers.embedding.shared_weights import share


class BertC:
    """An encoder whose weights for products are laid out and shared; all other weights are the model's own.

    Whoever makes one compares its vectors with the model's own before trusting it.

    Attributes:
        dtype: Format of the factors of its products.

    Args:
        transformer: The transformer that computes in float32.
        kernels: The compiled functions that compute instead.

    Raises:
        NotImplementedError: The model is of another kind.
    """

    def __init__(self, transformer: Any, kernels: Kernels) -> None:
        self._kernels = kernels
        self.dtype = str(kernels.variant.dtype).removeprefix("torch.")
        encoder = read_encoder(transformer)
        dim, n_heads, layers = encoder.dim, encoder.n_heads, encoder.layers
        if dim not in [size * n_heads for size in HEAD_SIZES]:
            raise NotImplementedError("its heads have an unusual size")
        products = [
            linears for layer in layers for linears in (layer.heads, [layer.output], [layer.up], [layer.down])
        ]
        laid = share([tensor for linears in products for tensor in kernels.lay_out(linears)])
        linears = [
            CLinear(weight.data_ptr(), bias.data_ptr(), linears[0].in_features, n_outputs(linears))
            for linears, weight, bias in zip(products, laid[::2], laid[1::2], strict=True)
        ]
        tables = (encoder.words, encoder.positions, encoder.types)
        norms = [norm for layer in layers for norm in (layer.output_norm, layer.down_norm)]
        self._kept = [*tables, encoder.norm, *norms, *laid]
        self._encoder = CEncoder(
            (3 * ctypes.c_void_p)(*(table.data_ptr() for table in tables)),
            (3 * ctypes.c_int64)(*map(len, tables)),
            c_norm(encoder.norm),
            (CLayer * len(layers))(
                *(
                    CLayer(*linears[4 * i : 4 * i + 4], *map(c_norm, norms[2 * i : 2 * i + 2]))
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
            row: Features of the texts by name, integers, shape (n_tokens,) each.
            positions: Position of each token in its text, int64, shape (n_tokens,).
            layout: Where each text lies in the row.

        Returns:
            float32, shape (n_tokens, dim).

        Raises:
            IndexError: A token or position is not in the model's tables.
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
