"""The BERT family's encoder on a row of texts, on a GPU: a layer is four products and three other kernels.

Products and attention have 16 bits, hidden states 32, as in `bert_c.py`. The model's own modules give the
same in three times as many kernels, most of which wait for memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  its usual name

from penstock_workers.embedding.bert import read_encoder
from penstock_workers.embedding.row import RowLayout
from penstock_workers.hardware.copies import upload


class _Product(NamedTuple):
    weight: Tensor
    bias: Tensor


class BertGpu:
    """An encoder with weights of its own for products; all other weights are the model's own.

    Whoever makes one compares its vectors with the model's own before trusting it.

    Attributes:
        dtype: Name of the format of products.

    Args:
        transformer: The transformer that computes in float32.
        n_words: Number of words that the tokenizer knows.
        dtype: Format of products and attention, 16 bits.

    Raises:
        NotImplementedError: The model is of another kind, or Triton is not installed.
    """

    def __init__(self, transformer: Any, n_words: int, dtype: torch.dtype = torch.bfloat16) -> None:
        try:
            from penstock_workers.embedding import triton_kernels
        except ModuleNotFoundError as error:
            raise NotImplementedError(f"{error.name} is not installed") from error
        self._kernels, self._dtype = triton_kernels, dtype
        self.dtype = str(dtype).removeprefix("torch.")
        encoder = read_encoder(transformer)
        if encoder.dim not in [size * encoder.n_heads for size in triton_kernels.HEAD_SIZES]:
            raise NotImplementedError("its heads have an unusual size")
        if n_words > len(encoder.words):  # kernels on the GPU do not check it
            raise NotImplementedError("its tokenizer knows words that it does not")
        self._tables = encoder.words, encoder.positions, encoder.types
        self._norm, self._n_heads = encoder.norm, encoder.n_heads
        self._layers = [
            (
                self._lay_out(layer.heads),
                self._lay_out([layer.output]),
                layer.output_norm,
                self._lay_out([layer.up]),
                self._lay_out([layer.down]),
                layer.down_norm,
            )
            for layer in encoder.layers
        ]

    def hidden(self, row: Mapping[str, Tensor], positions: Tensor, layout: RowLayout) -> Tensor:
        """Return the last hidden states.

        Args:
            row: Features of the texts by name, integers, shape (n_tokens,) each.
            positions: Position of each token in its text, int64, shape (n_tokens,), on the CPU.
            layout: Where each text lies in the row.

        Returns:
            float32, shape (n_tokens, dim).

        Raises:
            IndexError: A position is not in the model's table.
        """
        kernels = self._kernels
        if int(positions.max()) >= len(self._tables[1]):
            raise IndexError("a text is longer than the model has positions")
        words = row["input_ids"].long()
        types = row["token_type_ids"].long() if "token_type_ids" in row else torch.zeros_like(words)
        places = words, upload(positions, layout.device), types
        states: Tensor
        states, rounded = kernels.embed(places, self._tables, self._norm, self._dtype)
        shape = len(words), 3, self._n_heads, states.shape[1] // self._n_heads
        for heads, output, output_norm, up, down, down_norm in self._layers:
            found = kernels.attend(F.linear(rounded, *heads).view(shape), layout.tiles, shape[-1] ** -0.5)
            rounded = kernels.add_norm(states, F.linear(found, *output), output_norm)
            # GELU is computed with the product, on a GPU by its approximation with tanh
            inner = torch._addmm_activation(up.bias, rounded, up.weight.t(), use_gelu=True)
            rounded = kernels.add_norm(states, F.linear(inner, *down), down_norm)
        return states

    def _lay_out(self, linears: Sequence[nn.Linear]) -> _Product:
        """Return the weights and biases of several layers, as of one layer."""
        return _Product(
            torch.cat([linear.weight.detach() for linear in linears]).to(self._dtype),
            torch.cat([linear.bias.detach() for linear in linears]).to(self._dtype),
        )
