"""Choose the next tokens from logits: all rows in one pass, none of them changed by its batch mates."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from penstock_workers.generation.grammar import restrict
from penstock_workers.generation.sampling_params import SamplingParams
from penstock_workers.generation.sequence import TokenSequence

_N_LIKELIEST = 256  # of a vocabulary of 150,000, sorting them all would take longer than a small model's step


@torch.inference_mode()  # logits are written to, which torch allows nowhere else
def sample(logits: Tensor, sequences: Sequence[TokenSequence]) -> list[int | None]:
    """Choose each row's next token; one transfer from the device for all of them.

    Log-probabilities, for rows that ask for them, are the model's own: before formats, penalties and
    temperature, like vLLM's `raw_logprobs`.

    Args:
        logits: float32, shape (n_rows, vocab); single tokens may be forbidden with -inf.
        sequences: sequence of each row.

    Returns:
        A token for each row, None where its logits are not finite.
    """
    if asking := [i for i, sequence in enumerate(sequences) if sequence.n_top_logprobs is not None]:
        own = logits[asking].log_softmax(dim=-1)
    # First of all: top_k, top_p and the rest choose among what is allowed.
    if grammars := {place: sequence.grammar for place, sequence in enumerate(sequences) if sequence.grammar}:
        places = list(grammars)
        logits[places] = restrict(logits[places], list(grammars.values()))
    for place, sequence in enumerate(sequences):
        if sequence.forbidden is not None and sequence.grammar is None:
            sequence.forbidden.restrict(logits[place], sequence.prompt, sequence.output)
    penalized = [place for place, sequence in enumerate(sequences) if sequence.sampling.is_penalized]
    if penalized:
        logits[penalized] = penalize(logits[penalized], [sequences[place] for place in penalized])
    # NaN anywhere is the largest.
    largest, tokens = logits.max(dim=-1)
    is_finite = largest.isfinite()
    if hot := [place for place, sequence in enumerate(sequences) if not sequence.sampling.is_greedy]:
        chosen = [sequences[place] for place in hot]
        rows = logits if len(hot) == len(sequences) else logits[hot]
        tokens[hot] = draw(rows, [t.sampling for t in chosen], [len(t.output) for t in chosen])
    valid = tokens.where(is_finite, -1)
    if asking:
        moved = _note_logprobs(own, tokens[asking], valid, [sequences[i] for i in asking])
    else:
        moved = valid.tolist()
    return [None if token < 0 else token for token in moved]


def _note_logprobs(
    own: Tensor, chosen: Tensor, valid: Tensor, sequences: Sequence[TokenSequence]
) -> list[int]:
    """Note log-probabilities of the tokens that were chosen for some rows; return those of all as numbers.

    Args:
        own: log-probabilities, float32, shape (n_asking, vocab).
        chosen: tokens of these rows, int64, shape (n_asking,).
        valid: what to return, int64, shape (n_rows,); it comes from the device with the rest.
        sequences: sequences of the rows that ask.
    """
    n_most = min(max(sequence.n_top_logprobs or 0 for sequence in sequences), own.shape[-1])
    likeliest = own.topk(n_most)
    ids = torch.cat([chosen[:, None], likeliest.indices], dim=-1)
    values = torch.cat([own.gather(-1, chosen[:, None]), likeliest.values], dim=-1)
    moved = torch.cat([valid, ids.flatten(), values.view(torch.int32).flatten()]).cpu().numpy()
    all_ids, all_values = moved[len(valid) :].astype(np.int32).reshape(2, *ids.shape)
    for sequence, its_ids, its_values in zip(sequences, all_ids, all_values.view(np.float32), strict=True):
        n = 1 + (sequence.n_top_logprobs or 0)
        sequence.logprobs.append((its_ids[:n].copy(), its_values[:n].copy()))
    found: list[int] = moved[: len(valid)].tolist()
    return found


def penalize(logits: Tensor, sequences: Sequence[TokenSequence]) -> Tensor:
    """Make tokens that came before less likely, or more.

    Args:
        logits: float32, shape (n_rows, vocab).
        sequences: sequence of each row.

    Returns:
        float32, shape (n_rows, vocab).

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1; the sign rule is transformers'
    `RepetitionPenaltyLogitsProcessor`. Presence: OpenAI's API reference, `presence_penalty`, of the
    answer's tokens, as in vLLM.
    """
    in_either, in_answer = torch.stack([_seen_tokens(sequence, logits) for sequence in sequences]).unbind(1)
    repetition, presence = (
        torch.tensor(column, dtype=logits.dtype, device=logits.device)[:, None]
        for column in zip(
            *((t.sampling.repetition_penalty, t.sampling.presence_penalty) for t in sequences), strict=True
        )
    )
    scaled = torch.where(logits < 0, logits * repetition, logits / repetition)
    return logits.where(~in_either, scaled) - presence * in_answer


def _seen_tokens(sequence: TokenSequence, like: Tensor) -> Tensor:
    """Return which tokens were in prompt or output, and which in the output; bool, shape (2, vocab)."""
    if sequence.seen is None:
        sequence.seen = torch.zeros(2, like.shape[-1], dtype=torch.bool, device=like.device)
        sequence.seen[0, list(sequence.prompt)] = True
    sequence.seen[:, sequence.output[sequence.n_seen :]] = True
    sequence.n_seen = len(sequence.output)
    return sequence.seen


def draw(logits: Tensor, samplings: Sequence[SamplingParams], n_drawn: Sequence[int]) -> Tensor:
    """Draw a token for each row. The order of the filters is transformers': temperature, top_k, top_p, min_p.

    Args:
        logits: float32, shape (n_rows, vocab); a row that is not finite gets any token.
        samplings: parameters of each row, with temperatures above 0.
        n_drawn: how many tokens each row drew before.

    Returns:
        int64, shape (n_rows,), on the device of `logits`.
    """
    device = logits.device
    if device.type == "mps":  # has no float64
        logits = logits.cpu()
    # float64: a row's batch mates change the last bits of its logits, and rounding of ours comes on top.
    noise = torch.tensor([s.noise(n) for s, n in zip(samplings, n_drawn, strict=True)], dtype=torch.float64)
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
        options: each row's temperature, top_k, top_p, min_p.
        noise: random number of each row, from 0 to below 1.
        n_likeliest: number of tokens to look at; not below any top_k, and more are taken if top_p needs them.

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
