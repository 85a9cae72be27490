"""A request that is ready for the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

from penstock.conversation import Tool
from penstock_workers.generation.grammar import Grammar
from penstock_workers.generation.sampling_params import SamplingParams
from penstock_workers.generation.thinking import Stage

A = TypeVar("A")


@dataclass(frozen=True, slots=True, kw_only=True)
class StopConditions:
    """What ends an answer early, besides the tokens by which the model itself ends one.

    Attributes:
        strings: strings that end the text before them.
        marks: names of the tokens that are no text, but stand in one of `strings`.
        token_ids: tokens that end the answer.
    """

    strings: tuple[str, ...] = ()
    marks: Mapping[int, str] = field(default_factory=dict)
    token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request as tokens, with all that its answers depend on.

    Attributes:
        ids: tokens of the whole conversation, the start of the answer included.
        sampling: parameters by which tokens are drawn.
        max_new_tokens: most tokens of an answer; fits into the context window together with `ids`.
        stop: strings and tokens that end the answer.
        context: last tokens of `ids` that are text, where the answer goes on from it; empty where a text
            begins.
        grammar: format that the text has to follow, at its beginning; it alone then says where the answer
            ends.
        stage: part that the answer begins with.
        is_chat: True if the chat template made the prompt.
        tools: functions that the model may call.
        cut_tokens: see `Usage`.
        n_choices: number of answers that are wanted.
        n_top_logprobs: number of tokens whose log-probabilities are wanted beside the chosen one's; None
            wants no log-probabilities.
    """

    ids: tuple[int, ...]
    sampling: SamplingParams
    max_new_tokens: int
    stop: StopConditions
    context: tuple[int, ...] = ()
    grammar: Grammar | None = None
    stage: Stage = "text"
    is_chat: bool = True
    tools: Sequence[Tool] | None = None
    cut_tokens: int | None = None
    n_choices: int = 1
    n_top_logprobs: int | None = None

    @property
    def n_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.ids)

    def choices(self) -> list[Self]:
        """Return a prompt for each answer that is computed; one for all where they would be equal."""
        n = 1 if self.sampling.is_greedy else self.n_choices
        return [replace(self, sampling=self.sampling.choice(index)) for index in range(n)]

    def answers(self, found: Sequence[A]) -> list[A]:
        """Return as many answers as are wanted, from the answers to `choices`."""
        return [*found] * (self.n_choices // len(found))
