"""Results of jobs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from penstock.conversation import ToolCall

FinishReason = Literal["stop", "length"]
Vectors = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.int8] | NDArray[np.uint8]
"""Shape (n_texts, dim); where eight dimensions share a byte (n_texts, dim / 8, rounded up)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where a job's time went, seconds.

    Attributes:
        queued_s: time in the queue, from the sender's clock to the worker's, with any difference of the two.
        prepared_s: time of checking and tokenizing; with a cache of vectors, of asking it, and of waiting for
            other jobs.
        batched_s: time of waiting for a place in a batch.
        computed_s: time from the first forward pass that held a part of the job to the end of the last one.
    """

    queued_s: float
    prepared_s: float
    batched_s: float
    computed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Cost of a job, in tokens of its model.

    Attributes:
        prompt_tokens: tokens that were computed for the prompt.
        completion_tokens: tokens of the answer, reasoning included.
        cut_tokens: tokens of the conversation that `truncation` left out; None if it left nothing out.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    cut_tokens: int | None = None

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedResult:
    """Vectors of one job.

    Attributes:
        model: the name it is served under.
        vectors: see `Vectors`; rows in the order of the texts.
        usage: tokens after truncation to the model's length limit, special tokens included; those of texts
            whose vectors were in the worker's cache count as if they had been computed.
        timings: the job's time, by what it went into.
    """

    model: str
    vectors: Vectors
    usage: Usage
    timings: Timings

    def __repr__(self) -> str:
        # Celery logs it and sends it to Flower; numpy's own would format up to a thousand numbers.
        return f"EmbedResult({self.model}, {self.vectors.dtype}{list(self.vectors.shape)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token and how likely the model found it.

    Attributes:
        token: text of the token; what is no whole character is replaced.
        bytes: UTF-8 bytes of the token; those of all tokens of an answer, put together, are its text.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens at its place, likeliest first, as many as the request asked for.
    """

    token: str
    bytes: bytes
    logprob: float
    top: "tuple[TokenLogprob, ...]" = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Logprobs(Sequence[TokenLogprob]):
    """Log-probabilities of an answer's tokens, as `usage` counts them; a sequence of `TokenLogprob`.

    They are the model's own, before penalties, formats and temperature.

    Attributes:
        ids: ids of the token that was chosen at each place, then of the likeliest ones; int32, shape
            (n_tokens, 1 + top_logprobs). Of a remote model, numbers in the order of their first places; -1
            where its server told fewer.
        values: log-probabilities of these tokens, float32, of the same shape; -inf where there is none.
        tokens: token id, in digits -> its bytes, as characters of the same numbers (Latin-1).
    """

    ids: NDArray[np.int32]
    values: NDArray[np.float32]
    tokens: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, place: int) -> TokenLogprob: ...

    @overload
    def __getitem__(self, place: slice) -> list[TokenLogprob]: ...

    def __getitem__(self, place: int | slice) -> TokenLogprob | list[TokenLogprob]:
        if isinstance(place, slice):
            return [self[i] for i in range(len(self))[place]]
        chosen, *top = (
            self._token(*pair)
            for pair in zip(self.ids[place].tolist(), self.values[place].tolist(), strict=True)
            if pair[0] >= 0
        )
        return replace(chosen, top=tuple(top))

    def _token(self, token_id: int, logprob: float) -> TokenLogprob:
        content = self.tokens[str(token_id)].encode("latin-1")
        return TokenLogprob(token=content.decode(errors="replace"), bytes=content, logprob=logprob)

    def __repr__(self) -> str:
        return f"Logprobs({len(self)} tokens)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of several answers to a request; see `GenerateResult`."""

    index: int
    text: str
    finish_reason: FinishReason
    reasoning: str | None = None
    tool_calls: Sequence[ToolCall] | None = None
    logprobs: Logprobs | None = None

    def __repr__(self) -> str:
        return f"Choice({self.index}, {self.finish_reason})"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """An answer, or several; what is said of one is said of the first.

    Attributes:
        model: the name it is served under.
        text: the new text alone; stop strings are left out.
        finish_reason: `stop` if the model or a stop string ended it, `length` if a limit did.
        usage: tokens of prompt and answers; the prompt's once.
        timings: the job's time, by what it went into.
        reasoning: thoughts of the model before the text, where its chat template marks them; else None.
        tool_calls: calls of tools in the text, in OpenAI's form, ready for `history`; only where `tools` were
            given and the model's tokenizer says how to read its calls (`response_template`), else None. The
            text has them too, as the model wrote them; not that of a remote model, whose server reads them.
        logprobs: log-probabilities of its tokens, of the reasoning too, if the request asked for them.
        others: the answers after the first; `choices` has all.
    """

    model: str
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    reasoning: str | None = None
    tool_calls: Sequence[ToolCall] | None = None
    logprobs: Logprobs | None = None
    others: Sequence[Choice] | None = None

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All answers; as many as `n` of the request."""
        first = Choice(
            index=0,
            text=self.text,
            finish_reason=self.finish_reason,
            reasoning=self.reasoning,
            tool_calls=self.tool_calls,
            logprobs=self.logprobs,
        )
        return (first, *(self.others or ()))

    def __repr__(self) -> str:
        # Celery logs it and sends it to Flower: no word of the answer.
        return f"GenerateResult({self.model}, {self.usage.completion_tokens} tokens, {self.finish_reason})"


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankResult:
    """How well documents answer a query.

    Attributes:
        model: the name it is served under.
        scores: float32, shape (n_documents,), in the order of the request; higher is better.
        order: places of documents in the request, the best first, as many as `top_n` asked for.
        usage: tokens of the pairs of query and document, after truncation, special tokens included.
        timings: the job's time, by what it went into.
    """

    model: str
    scores: NDArray[np.float32]
    order: Sequence[int]
    usage: Usage
    timings: Timings

    def __repr__(self) -> str:
        # Celery logs it and sends it to Flower.
        return f"RerankResult({self.model}, {len(self.scores)} documents)"


Result = EmbedResult | GenerateResult | RerankResult
