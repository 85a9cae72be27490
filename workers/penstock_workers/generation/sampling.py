"""How the next tokens are chosen from logits: all rows in one pass, none of them by its neighbours."""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.request import GenerationOptions
from penstock_workers.generation.generation_config import Limits
from penstock_workers.generation.grammar import Grammar, restrict

_N_LIKELIEST = 256  # of a vocabulary of 150,000, sorting them all would take longer than a small model's step
_SEED_BITS = 63
_NOISE_BYTES = 6  # 48 bits: `noise * total` stays below `total` in float64, so no draw falls off the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request draws its tokens; ranges as in `GenerationOptions`, nothing left open.

    Attributes:
        temperature: 0 is greedy, and the rest but the penalties is then without effect.
        seed: the same seed draws the same text, alone and in company.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
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
            presence_penalty=options.presence_penalty or 0.0,
            seed=secrets.randbits(_SEED_BITS) if options.seed is None else options.seed,
        )

    def choice(self, index: int) -> Self:
        """Return how one of several answers is drawn: the first with this seed, others with their own.

        These follow from seed and index, so an answer is the same whatever else is asked.
        """
        if index == 0:
            return self
        digest = hashlib.blake2b(b"%d choice %d" % (self.seed, index), digest_size=8).digest()
        return replace(self, seed=int.from_bytes(digest) >> (64 - _SEED_BITS))


@dataclass(slots=True, kw_only=True, eq=False)
class Trail:
    """What choosing a request's next token depends on besides the logits.

    Attributes:
        sampling: how.
        prompt: its tokens.
        grammar: what may be chosen next; None for anything.
        limits: what its model's own configuration forbids, where no grammar says what may come.
        n_likeliest: how many of the likeliest tokens to note at each step, besides the one that is chosen;
            None notes nothing.
        tokens: what was chosen so far.
        noted: for each of these, token ids, int32, and log-probabilities, float32; each shape
            (1 + n_likeliest,), the chosen one first.
    """

    sampling: Sampling
    prompt: Sequence[int]
    grammar: Grammar | None = None
    limits: Limits | None = None
    n_likeliest: int | None = None
    tokens: list[int] = field(default_factory=list)
    noted: list[tuple[NDArray[np.int32], NDArray[np.float32]]] = field(default_factory=list)
    _seen: Tensor | None = None  # in prompt or answer, and in the answer; bool, shape (2, vocab)
    _n_seen: int = 0

    def seen(self, like: Tensor) -> Tensor:
        """Return which tokens were in prompt or answer, and which in the answer; bool, shape (2, vocab)."""
        if self._seen is None:
            self._seen = torch.zeros(2, like.shape[-1], dtype=torch.bool, device=like.device)
            self._seen[0, list(self.prompt)] = True
        self._seen[:, self.tokens[self._n_seen :]] = True
        self._n_seen = len(self.tokens)
        return self._seen


@torch.inference_mode()  # logits are written to, which torch allows nowhere else
def choose(logits: Tensor, trails: Sequence[Trail]) -> list[int | None]:
    """Choose each row's next token; one transfer from the device for all of them.

    Log-probabilities, of rows that ask, are the model's own: before formats, penalties and temperature, as
    vLLM's `raw_logprobs`.

    Args:
        logits: float32, shape (n_rows, vocab); single tokens may be forbidden with -inf.
        trails: of the rows.

    Returns:
        A token for each row, None where its logits are not finite.
    """
    if asking := [place for place, trail in enumerate(trails) if trail.n_likeliest is not None]:
        own = logits[asking].log_softmax(dim=-1)
    # First of all: top_k, top_p and the rest choose among what is allowed.
    if grammars := {place: trail.grammar for place, trail in enumerate(trails) if trail.grammar}:
        places = list(grammars)
        logits[places] = restrict(logits[places], list(grammars.values()))
    for place, trail in enumerate(trails):
        if trail.limits is not None and trail.grammar is None:
            trail.limits.restrict(logits[place], trail.prompt, trail.tokens)
    penalized = [place for place, trail in enumerate(trails) if _is_penalized(trail.sampling)]
    if penalized:
        logits[penalized] = penalize(logits[penalized], [trails[place] for place in penalized])
    # NaN anywhere is the largest.
    largest, tokens = logits.max(dim=-1)
    is_finite = largest.isfinite()
    if hot := [place for place, trail in enumerate(trails) if trail.sampling.temperature > 0]:
        chosen = [trails[place] for place in hot]
        rows = logits if len(hot) == len(trails) else logits[hot]
        tokens[hot] = draw(rows, [t.sampling for t in chosen], [len(t.tokens) for t in chosen])
    valid = tokens.where(is_finite, -1)
    moved = _note(own, tokens[asking], valid, [trails[i] for i in asking]) if asking else valid.tolist()
    return [None if token < 0 else token for token in moved]


def _note(own: Tensor, chosen: Tensor, valid: Tensor, trails: Sequence[Trail]) -> list[int]:
    """Note log-probabilities of the tokens that were chosen for some rows; return those of all as numbers.

    Args:
        own: log-probabilities, float32, shape (n_asking, vocab).
        chosen: tokens of these rows, int64, shape (n_asking,).
        valid: what to return, int64, shape (n_rows,); it comes from the device with the rest.
        trails: of the rows that ask.
    """
    n_most = min(max(trail.n_likeliest or 0 for trail in trails), own.shape[-1])
    likeliest = own.topk(n_most)
    ids = torch.cat([chosen[:, None], likeliest.indices], dim=-1)
    values = torch.cat([own.gather(-1, chosen[:, None]), likeliest.values], dim=-1)
    moved = torch.cat([valid, ids.flatten(), values.view(torch.int32).flatten()]).cpu().numpy()
    all_ids, all_values = moved[len(valid) :].astype(np.int32).reshape(2, *ids.shape)
    for trail, its_ids, its_values in zip(trails, all_ids, all_values.view(np.float32), strict=True):
        n = 1 + (trail.n_likeliest or 0)
        trail.noted.append((its_ids[:n].copy(), its_values[:n].copy()))
    found: list[int] = moved[: len(valid)].tolist()
    return found


def _is_penalized(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0


def penalize(logits: Tensor, trails: Sequence[Trail]) -> Tensor:
    """Make tokens that were seen before less likely, or more.

    Args:
        logits: float32, shape (n_rows, vocab).
        trails: of the rows.

    Returns:
        float32, shape (n_rows, vocab).

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1; the sign rule is transformers'
    `RepetitionPenaltyLogitsProcessor`. Presence: OpenAI's API reference, `presence_penalty`, of the
    answer's tokens, as in vLLM.
    """
    in_either, in_answer = torch.stack([trail.seen(logits) for trail in trails]).unbind(1)
    repetition, presence = (
        torch.tensor(column, dtype=logits.dtype, device=logits.device)[:, None]
        for column in zip(
            *((t.sampling.repetition_penalty, t.sampling.presence_penalty) for t in trails), strict=True
        )
    )
    scaled = torch.where(logits < 0, logits * repetition, logits / repetition)
    return logits.where(~in_either, scaled) - presence * in_answer


def draw(logits: Tensor, samplings: Sequence[Sampling], n_drawn: Sequence[int]) -> Tensor:
    """Draw a token for each row. The order of the filters is transformers': temperature, top_k, top_p, min_p.

    Args:
        logits: float32, shape (n_rows, vocab); a row that is not finite gets any token.
        samplings: of the rows, with temperatures above 0.
        n_drawn: how many tokens each row drew before.

    Returns:
        int64, shape (n_rows,), on the device of `logits`.
    """
    device = logits.device
    if device.type == "mps":  # has no float64
        logits = logits.cpu()
    # float64: a row's neighbours change the last bits of its logits, and rounding of ours comes on top.
    noise = torch.tensor(
        [_noise(s.seed, n) for s, n in zip(samplings, n_drawn, strict=True)], dtype=torch.float64
    )
    options = torch.tensor(
        [[s.temperature, s.top_k, s.top_p, s.min_p] for s in samplings], dtype=torch.float64
    )
    noise, options = noise.to(logits.device), options.to(logits.device)
    vocab = logits.shape[-1]
    cut = [i for i, s in enumerate(samplings) if 0 < s.top_k < vocab or s.top_p < 1]
    whole = [i for i in range(len(samplings)) if i not in cut]
    tokens = torch.empty(len(samplings), dtype=torch.long, device=logits.device)
    if cut:
        n = max(_N_LIKELIEST, *(s.top_k for s in samplings if s.top_k < vocab), 0)
        tokens[cut] = _draw_from_likeliest(logits[cut], options[cut], noise[cut], n)
    if whole:
        tokens[whole] = _draw_from_all(logits[whole], options[whole], noise[whole])
    return tokens.to(device)


def _draw_from_all(logits: Tensor, options: Tensor, noise: Tensor) -> Tensor:
    """Draw where no filter needs an order; shapes (n, vocab), (n, 4), (n,) -> (n,)."""
    scores = logits.double()
    shares = ((scores - scores.amax(-1, keepdim=True)) / options[:, :1]).exp()  # of the largest one
    return _pick(shares * (shares >= options[:, 3:]), noise)


def _draw_from_likeliest(logits: Tensor, options: Tensor, noise: Tensor, n_likeliest: int) -> Tensor:
    """Draw where top_k or top_p cuts; shapes (n, vocab), (n, 4), (n,) -> (n,).

    Args:
        logits: see `draw`.
        options: temperature, top_k, top_p, min_p.
        noise: between 0 and 1.
        n_likeliest: tokens to look at; not below any top_k, and more are taken if top_p needs them.

    Source of top_p: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    temperature, top_k, top_p, min_p = options[:, :, None].unbind(1)
    vocab, n = logits.shape[-1], min(logits.shape[-1], n_likeliest)
    best, ids = logits.topk(n)
    shares = ((best.double() - best[:, :1]) / temperature).exp()  # of the largest one
    # Ties with the last one that top_k keeps are kept, as by transformers.
    has_k = (top_k > 0) & (top_k < vocab)
    shares = shares * (~has_k | (best >= best.gather(-1, (top_k.long() - 1).clamp(0, n - 1))))
    everything = ((logits.double() - best[:, :1]) / temperature).exp().sum(-1, keepdim=True)
    total = shares.sum(-1, keepdim=True).where(has_k, everything)
    before = (shares.cumsum(-1) - shares) / total
    kept = shares * (before < top_p) * (shares >= min_p)
    # In the order of token ids: near ties may swap places in the sorted order, and the draw would follow.
    ids, order = ids.sort(-1)
    tokens = ids.gather(-1, _pick(kept.gather(-1, order), noise)[:, None])[:, 0]
    needs_more = ~has_k & (shares.sum(-1, keepdim=True) < top_p * total) & (shares[:, -1:] >= min_p)
    if n < vocab and (places := needs_more[:, 0].nonzero()[:, 0].tolist()):
        tokens[places] = _draw_from_likeliest(logits[places], options[places], noise[places], 16 * n)
    return tokens


def _pick(shares: Tensor, noise: Tensor) -> Tensor:
    """Return the place at which the sum of shares passes `noise` of its whole; (n, m), (n,) -> (n,)."""
    edges = shares.cumsum(-1)
    marks = edges[:, -1:] * noise[:, None]
    # Clamped for rows of NaN, which have no such place.
    return torch.searchsorted(edges, marks, right=True)[:, 0].clamp(max=shares.shape[-1] - 1)


def _noise(seed: int, n_drawn: int) -> float:
    # By counter, not by generator: the same whoever else draws, and after a takeover by another worker.
    digest = hashlib.blake2b(b"%d %d" % (seed, n_drawn), digest_size=_NOISE_BYTES).digest()
    return int.from_bytes(digest) / (1 << 8 * _NOISE_BYTES)
