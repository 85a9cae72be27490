"""One request in the batch: its tokens, how they are chosen, and what it waits for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from penstock_workers.generation.prompt_prefix import PromptPrefix

if TYPE_CHECKING:  # admission needs no torch
    from torch import Tensor

    from penstock_workers.generation.generation_config import ForbiddenTokens
    from penstock_workers.generation.grammar import Grammar
    from penstock_workers.generation.sampling_params import SamplingParams

A = TypeVar("A")

_ANY_NUMBER: Final = 1 << 30


@dataclass(slots=True, kw_only=True, eq=False)
class TokenSequence:
    """What choosing a request's next token depends on besides the logits.

    Attributes:
        sampling: parameters of the request.
        prompt: token ids of the prompt.
        grammar: tokens that may come next; None allows any.
        forbidden: tokens that the model's own configuration forbids; only asked where there is no grammar.
        n_top_logprobs: number of likeliest tokens to note at each step, besides the chosen one; None notes
            nothing.
        output: token ids chosen so far.
        logprobs: token ids, int32, and log-probabilities, float32, for each token of the output; each of
            shape (1 + n_top_logprobs,), the chosen token first.
        seen: tokens that are in prompt or output, and those that are in the output; bool, shape (2, vocab).
            Kept by the penalties of `sampling`; None before.
        n_seen: number of output tokens that `seen` knows.
    """

    sampling: "SamplingParams"
    prompt: Sequence[int]
    grammar: "Grammar | None" = None
    forbidden: "ForbiddenTokens | None" = None
    n_top_logprobs: int | None = None
    output: list[int] = field(default_factory=list)
    logprobs: list[tuple[NDArray[np.int32], NDArray[np.float32]]] = field(default_factory=list)
    seen: "Tensor | None" = None
    n_seen: int = 0


class ScheduledSequence(Generic[A]):
    """A sequence that waits for a place in the batch, or has one.

    Attributes:
        tokens: prompt and output, and how the next token is chosen.
        max_new_tokens: most tokens of its output.
        max_prefill_rows: most prompts in a prefill that this one takes part in; lowered after a failure.
        max_batch_rows: most sequences in a batch that this one takes part in; lowered after a failure.
    """

    def __init__(
        self,
        tokens: TokenSequence,
        max_new_tokens: int,
        *,
        take: Callable[[int], A | None],
        is_over: Callable[[], bool] = lambda: False,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        """Make a sequence.

        Args:
            tokens: without output yet.
            max_new_tokens: most tokens of its output.
            take: takes the newest token, which is in the output already; returns the answer if that ends it,
                or raises the error that does.
            is_over: says that nobody wants the answer any more.
            on_start: called before the prompt is computed.
        """
        self.tokens, self.max_new_tokens = tokens, max_new_tokens
        self.take, self.is_over, self.on_start = take, is_over, on_start
        self.max_prefill_rows = self.max_batch_rows = _ANY_NUMBER

    @property
    def ids(self) -> list[int]:
        """All token ids so far; computed again after the sequence had to leave the batch."""
        return [*self.tokens.prompt, *self.tokens.output]

    @property
    def n_ids(self) -> int:
        """Number of tokens so far."""
        return len(self.tokens.prompt) + len(self.tokens.output)

    @property
    def n_final(self) -> int:
        """Most tokens that prompt and output may have in the end."""
        return len(self.tokens.prompt) + self.max_new_tokens

    @cached_property
    def prefix(self) -> PromptPrefix:
        """The prompt, to be compared with others'."""
        return PromptPrefix(self.tokens.prompt)

    def is_duplicate_of(self, other: "ScheduledSequence[A]") -> bool:
        """Whether both go on from the same tokens."""
        mine, theirs = self.tokens, other.tokens
        is_same = mine.prompt is theirs.prompt or mine.prompt == theirs.prompt
        return is_same and mine.output == theirs.output
