"""The parts of an encoder of the BERT family, for those who compute it otherwise than its own modules."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation


@dataclass(frozen=True, slots=True, kw_only=True)
class BertLayer:
    """One layer. Each norm is applied to the sum of a block's input and output.

    Attributes:
        heads: The products that give queries, keys and values.
        output: The product after attention.
        output_norm: The norm after `output`.
        up: The product before GELU.
        down: The product after GELU.
        down_norm: The norm after `down`.
    """

    heads: Sequence[nn.Linear]
    output: nn.Linear
    output_norm: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear
    down_norm: nn.LayerNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class BertEncoder:
    """The whole encoder.

    Attributes:
        words: Embeddings of tokens, float32, shape (n_words, dim).
        positions: Embeddings of positions, float32, shape (n_positions, dim).
        types: Embeddings of token types, float32, shape (n_types, dim).
        norm: The norm of the sum of the three.
        layers: The layers in their order.
        n_heads: Number of attention heads.
        dim: Width of a hidden state.
    """

    words: Tensor
    positions: Tensor
    types: Tensor
    norm: nn.LayerNorm
    layers: Sequence[BertLayer]
    n_heads: int
    dim: int


def read_encoder(transformer: Any) -> BertEncoder:
    """Return the parts of a transformer.

    Raises:
        NotImplementedError: The transformer is of another kind, or not plain float32.
    """
    try:
        embeddings = transformer.embeddings
        encoder = BertEncoder(
            words=embeddings.word_embeddings.weight.detach(),
            positions=embeddings.position_embeddings.weight.detach(),
            types=embeddings.token_type_embeddings.weight.detach(),
            norm=embeddings.LayerNorm,
            layers=[_read_layer(layer) for layer in transformer.encoder.layer],
            n_heads=int(transformer.config.num_attention_heads),
            dim=int(embeddings.word_embeddings.weight.shape[1]),
        )
    except AttributeError as error:
        raise NotImplementedError(f"it is built differently: {error}") from error
    dim = encoder.dim
    if not encoder.layers:
        raise NotImplementedError("it has no layers")
    if not all(_is_table(table, dim) for table in (encoder.words, encoder.positions, encoder.types)):
        raise NotImplementedError("its tables are not plain float32")
    n_inner = encoder.layers[0].up.out_features
    for layer in encoder.layers:
        if not all(_is_norm(norm, dim) for norm in (encoder.norm, layer.output_norm, layer.down_norm)):
            raise NotImplementedError("its norms are of another kind")
        square = all(_is_linear(linear, dim, dim) for linear in (*layer.heads, layer.output))
        if not (square and _is_linear(layer.up, dim, n_inner) and _is_linear(layer.down, n_inner, dim)):
            raise NotImplementedError("its products are of another kind")
    return encoder


def _read_layer(layer: Any) -> BertLayer:
    attention, up = layer.attention, layer.intermediate
    if not isinstance(up.intermediate_act_fn, GELUActivation):
        raise NotImplementedError("its activation is not GELU")
    return BertLayer(
        heads=(attention.self.query, attention.self.key, attention.self.value),
        output=attention.output.dense,
        output_norm=attention.output.LayerNorm,
        up=up.dense,
        down=layer.output.dense,
        down_norm=layer.output.LayerNorm,
    )


def _is_table(table: Tensor, dim: int) -> bool:
    return table.shape[1] == dim and table.is_contiguous() and table.dtype == torch.float32


def _is_linear(layer: nn.Module, n_in: int, n_out: int) -> bool:
    if type(layer) is not nn.Linear or layer.bias is None:
        return False
    return layer.weight.shape == (n_out, n_in) and layer.weight.dtype == torch.float32


def _is_norm(norm: nn.Module, dim: int) -> bool:
    if type(norm) is not nn.LayerNorm or norm.bias is None:
        return False
    return norm.weight.shape == (dim,) and norm.weight.dtype == torch.float32
