"""Sampling parameters of one request, and the random numbers that follow from its seed."""

import hashlib
import secrets
from dataclasses import dataclass, replace
from typing import Self

from penstock.request import GenerationOptions

_SEED_BITS = 63
_NOISE_BYTES = 6  # 48 bits: `noise * total` stays below `total` in float64, so no draw falls off the end


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request draws its tokens; ranges as in `GenerationOptions`, nothing left open.

    Attributes:
        temperature: divides the logits; 0 is greedy, and then all but the penalties is without effect.
        top_k: number of likeliest tokens to draw from; 0 for all.
        top_p: share of the probability to draw from, likeliest tokens first.
        min_p: least probability of a token, as a share of the likeliest one's.
        repetition_penalty: divides the logits of tokens in prompt and output; 1 for none.
        presence_penalty: subtracted from the logits of tokens in the output; 0 for none.
        seed: the same seed draws the same text, alone and in a batch.
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
        """Return the parameters of one of several answers: the first has this seed, others have their own.

        Those follow from seed and index, so an answer is the same whatever else is asked.
        """
        if index == 0:
            return self
        digest = hashlib.blake2b(b"%d choice %d" % (self.seed, index), digest_size=8).digest()
        return replace(self, seed=int.from_bytes(digest) >> (64 - _SEED_BITS))

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is chosen each time."""
        return self.temperature == 0

    @property
    def is_penalized(self) -> bool:
        """Whether tokens that came before count less, or more."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0

    def noise(self, n_drawn: int) -> float:
        """Return the random number of a draw, from 0 to below 1, after `n_drawn` others."""
        # By counter, not by generator: the same whoever else draws, and after a takeover by another worker.
        digest = hashlib.blake2b(b"%d %d" % (self.seed, n_drawn), digest_size=_NOISE_BYTES).digest()
        return int.from_bytes(digest) / (1 << 8 * _NOISE_BYTES)
