"""From hidden states to vectors: each text's are pooled, projected and normalised, as its model says.

That is what a model's own modules behind its transformer do (`Pooling`, `Dense`, `Normalize`); nothing here
computes it otherwise. `Padded` runs them as the model itself does. What callers ask for (`truncate_dim`,
`normalize_embeddings`, `precision`) is done later, in `serving.formats`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penstock_workers.embedding.row import RowLayout


def pool(modules: Sequence[nn.Module], features: Mapping[str, Any]) -> Tensor:
    """Return the vectors of texts that are padded to one length.

    Args:
        modules: The model's own modules behind its transformer.
        features: Features of the texts, hidden states and mask among them, shape (n_texts, length, ...).

    Returns:
        Floats, shape (n_texts, dim).
    """
    found: Any = features
    for module in modules:
        found = module(found)
    vectors: Tensor = found["sentence_embedding"]
    return vectors


def pool_row(
    modules: Sequence[nn.Module],
    hidden: Tensor,
    row: Mapping[str, Tensor],
    layout: RowLayout,
    extra: Mapping[str, Any],
) -> Tensor:
    """Return the vectors of texts that lie end to end; see `pool`.

    Args:
        modules: The model's own modules behind its transformer.
        hidden: The last hidden states, shape (n_tokens, dim).
        row: Features of the texts by name, integers, shape (n_tokens,) each.
        layout: Where each text lies in the row.
        extra: Features of the whole batch, such as the length of a prompt that pooling leaves out.

    Returns:
        Floats, shape (n_texts, dim), in the order of the row.
    """
    found: list[Tensor] = []
    for part in layout.pooled:
        real = torch.ones(1, 1, dtype=torch.int64, device=layout.device).expand(part.n_texts, part.length)
        features: dict[str, Any] = {
            **extra,
            **{key: part.pad(value) for key, value in row.items()},
            "token_embeddings": part.pad(hidden),
            "attention_mask": real if part.real is None else part.real.long(),
        }
        found.append(pool(modules, features))
    return torch.cat(found)
