"""The BERT family's encoder on a row of texts: products, and what `kernels.c` does between them.

The model's own modules give the same and take 2 ms of Python for each batch, as long as all products of a
short text.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from penstock_workers.engines.attention import Layout
from penstock_workers.engines.kernels import LANES, Kernels
from penstock_workers.engines.products import Product


class Fused:
    """An encoder whose products are in bfloat16 already.

    Whoever makes one compares its vectors with the model's own before trusting it.

    Args:
        transformer: its products and weights are used as they are.
        kernels: what computes between products.

    Raises:
        NotImplementedError: the model is of another kind.
    """

    def __init__(self, transformer: Any, kernels: Kernels) -> None:
        self._kernels = kernels
        try:
            embeddings = transformer.embeddings
            self._tables = [
                getattr(embeddings, name).weight
                for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
            ]
            self._norm: nn.LayerNorm = embeddings.LayerNorm
            self._layers = [_Layer(layer) for layer in transformer.encoder.layer]
            self._n_heads: int = transformer.config.num_attention_heads
        except AttributeError as error:
            raise NotImplementedError(f"it is built differently: {error}") from error
        parts = [part for layer in self._layers for part in vars(layer).values()]
        is_plain = all(table.dtype == torch.float32 and table.is_contiguous() for table in self._tables)
        if not (is_plain and all(_is_known(part) for part in (self._norm, *parts))):
            raise NotImplementedError("its layers are of another kind")

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
            NotImplementedError: its heads have an unusual size.
        """
        kernels, words = self._kernels, row["input_ids"]
        types = row.get("token_type_ids", torch.zeros_like(words))
        indices = [index.long() for index in (words, positions, types)]
        hidden, rounded = kernels.embed_norm(indices, self._tables, self._norm)
        for layer in self._layers:
            query, key, value = (
                product(rounded).view(len(words), self._n_heads, -1)
                for product in (layer.query, layer.key, layer.value)
            )
            attended = kernels.attend(
                query, key, value, layout.ends, longest=layout.longest, scale=query.shape[2] ** -0.5
            )
            if attended is None:
                raise NotImplementedError("its heads have an unusual size")
            states = layer.output(attended.view(len(words), -1))
            hidden, rounded = kernels.add_norm(states, hidden, layer.output_norm)
            states = layer.down(layer.up(rounded))
            hidden, rounded = kernels.add_norm(states, hidden, layer.down_norm)
        return hidden


class _Layer:
    """The parts of a layer in the order in which they are used; `up` has the activation in it."""

    def __init__(self, layer: Any) -> None:
        attention = layer.attention
        self.query, self.key, self.value = (getattr(attention.self, n) for n in ("query", "key", "value"))
        self.output, self.output_norm = attention.output.dense, attention.output.LayerNorm
        self.up: Product = layer.intermediate.dense
        self.is_activated = isinstance(layer.intermediate.intermediate_act_fn, nn.Identity)
        self.down, self.down_norm = layer.output.dense, layer.output.LayerNorm


def _is_known(part: object) -> bool:
    if isinstance(part, nn.LayerNorm):
        return type(part) is nn.LayerNorm and part.bias is not None and part.normalized_shape[0] % LANES == 0
    return part is True or isinstance(part, Product)
