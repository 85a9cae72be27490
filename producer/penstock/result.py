"""What comes back from a job."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from penstock.request import ToolCall

FinishReason = Literal["stop", "length"]
Vectors = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.int8] | NDArray[np.uint8]
"""Shape (n_texts, dim); where eight dimensions share a byte (n_texts, dim / 8, rounded up)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where a job's time went, seconds.

    Attributes:
        queued_s: from the sender's clock to the worker's: in the queue, and any difference of the clocks.
        prepared_s: checking and tokenizing; with a cache of vectors, asking it, and waiting for other jobs.
        batched_s: waiting for a place in a batch.
        computed_s: from the first forward pass that held a part of the job to the last one's end.
    """

    queued_s: float
    prepared_s: float
    batched_s: float
    computed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a job cost, in tokens of its model.

    Attributes:
        prompt_tokens: computed for the prompt.
        completion_tokens: of the answer, reasoning included.
        cut_tokens: of the conversation that `truncation` left out; None: nothing was.
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
        timings: where the time went.
    """

    model: str
    vectors: Vectors
    usage: Usage
    timings: Timings

    def __repr__(self) -> str:
        # Celery logs it and sends it to Flower; numpy's own would format up to a thousand numbers.
        return f"EmbedResult({self.model}, {self.vectors.dtype}{list(self.vectors.shape)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """An answer.

    Attributes:
        model: the name it is served under.
        text: the new text alone; stop strings are left out.
        finish_reason: `stop` if the model or a stop string ended it, `length` if a limit did.
        usage: tokens of prompt and answer.
        timings: where the time went.
        reasoning: what the model thought before the text, where its chat template marks that; else None.
        tool_calls: those in the text, in OpenAI's form, ready for `history`; only where `tools` were given
            and the model's tokenizer says how to read its calls (`response_template`), else None. The text
            has them too, as the model wrote them.
    """

    model: str
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    reasoning: str | None = None
    tool_calls: Sequence[ToolCall] | None = None

    def __repr__(self) -> str:
        # Celery logs it and sends it to Flower: no word of the answer.
        return f"GenerateResult({self.model}, {self.usage.completion_tokens} tokens, {self.finish_reason})"


Result = EmbedResult | GenerateResult
