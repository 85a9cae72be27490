"""Where a model's tables of positions begin and end."""

import logging
from typing import Final

from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import nn

logger = logging.getLogger(__name__)

_TABLES: Final = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def first_position(transformer: nn.Module) -> int:
    """Return the position of a text's first token.

    RoBERTa and its relatives count from one past the padding's id, and skip tokens with that id.
    """
    for module in transformer.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(
            getattr(module, "position_embeddings", None), nn.Embedding
        ):
            return padding + 1
    return 0


def count_positions(transformer: nn.Module) -> int | None:
    """Return how many tokens of a text have a position in the table; None where positions are computed."""
    limits = []
    for module in transformer.modules():
        for name in _TABLES:
            table = getattr(module, name, None)
            if not isinstance(table, nn.Embedding):
                continue
            offset = getattr(table, "offset", 0)  # of BART and OPT
            if table.padding_idx is not None:
                offset = table.padding_idx + 1
            limits.append(table.num_embeddings - int(offset))
    return min(limits, default=None)


def fit_positions(name: str, model: SentenceTransformer | CrossEncoder) -> None:
    """Have texts cut where a model's positions end: RoBERTa has fewer than its configuration says."""
    transformer, limit = model.transformers_model, model.max_seq_length
    n_positions = None if transformer is None else count_positions(transformer)
    if n_positions is not None and (limit is None or limit > n_positions):
        logger.info("model %s: texts are cut at %d tokens, its positions", name, n_positions)
        model.max_seq_length = n_positions
