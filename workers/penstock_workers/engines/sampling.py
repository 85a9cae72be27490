"""How the next token is chosen from a model's logits. Knows one row at a time, never its neighbours."""

import hashlib
import secrets
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import GenerationConfig

from penstock.request import GenerationOptions

_NOISE_BYTES = 6  # 48 bits: `noise * total` stays below `total` in float64, so no draw falls off the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request draws its tokens; ranges as in `GenerationOptions`, nothing left open.

    Attributes:
        temperature: 0 is greedy, and the rest but the penalty is then without effect.
        seed: the same seed draws the same text, alone and in company.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int

    @classmethod
    def resolve(cls, options: GenerationOptions) -> Self:
        """Take `options`, each neutral where it is None; the seed then is random."""
        return cls(
            temperature=options.temperature or 0.0,
            top_k=options.top_k or 0,
            top_p=1.0 if options.top_p is None else options.top_p,
            min_p=options.min_p or 0.0,
            repetition_penalty=options.repetition_penalty or 1.0,
            seed=secrets.randbits(63) if options.seed is None else options.seed,
        )


def own_options(config: GenerationConfig) -> GenerationOptions:
    """Read a model's `generation_config.json`; what it leaves open is None, there and here."""
    strings = config.stop_strings
    return GenerationOptions.model_construct(
        max_new_tokens=config.max_new_tokens,
        temperature=(1.0 if config.temperature is None else config.temperature) if config.do_sample else 0.0,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        stop=(strings,) if isinstance(strings, str) else tuple(strings or ()),
    )


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen before less likely.

    Args:
        logits: float32, shape (vocab,).
        seen: True for tokens of the prompt and of the answer so far; bool, shape (vocab,).
        penalty: above 1 makes them less likely, below 1 more.

    Returns:
        float32, shape (vocab,).

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1; the sign rule is transformers'
    `RepetitionPenaltyLogitsProcessor`.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def draw(logits: Tensor, sampling: Sampling, n_drawn: int) -> int:
    """Draw a token. The order of the filters is transformers': temperature, top_k, top_p, min_p.

    Args:
        logits: float32 without NaN, the largest one finite; shape (vocab,).
        sampling: with a temperature above 0.
        n_drawn: how many tokens this request drew before.
    """
    ids = torch.arange(len(logits))
    if 0 < sampling.top_k < len(logits):
        # A temperature changes no order: filtered before it, fewer tokens are left to compute with.
        (ids,) = (logits >= logits.topk(sampling.top_k).values[-1]).nonzero(as_tuple=True)
    scores = logits[ids].double()
    shares = ((scores - scores.max()) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        shares = _nucleus(shares, sampling.top_p)
    if sampling.min_p > 0:
        shares = shares * (shares >= sampling.min_p * shares.max())
    # Summed in the order of token ids: a neighbour changes the last bits of logits, near ties would
    # then swap places in a sorted order, and the draw would follow them.
    edges = shares.cumsum(-1)
    mark = edges[-1:] * _noise(sampling.seed, n_drawn)
    return int(ids[torch.searchsorted(edges, mark, right=True)])


def _nucleus(shares: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens whose shares reach `top_p`; float64, shape (vocab,).

    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    # Tokens below this share have less than 1 - top_p together: none of them can belong, and sorting
    # a whole vocabulary of 150,000 would take longer than a small model's step.
    (candidates,) = (shares >= (1 - top_p) / len(shares)).nonzero(as_tuple=True)
    values, order = shares[candidates].sort(descending=True)
    within = values.cumsum(-1) - values < top_p
    kept = torch.zeros_like(shares)
    kept[candidates[order[within]]] = values[within]
    return kept


def _noise(seed: int, n_drawn: int) -> float:
    # By counter, not by generator: the same whoever else draws, and after a takeover by another worker.
    digest = hashlib.blake2b(b"%d %d" % (seed, n_drawn), digest_size=_NOISE_BYTES).digest()
    return int.from_bytes(digest) / (1 << 8 * _NOISE_BYTES)
