"""Text that is read while it is generated.

A worker appends new text to a Redis stream of the job, and notes it on the reply channel of the sender, who
takes what they have not seen. The stored result closes the stream. It holds the whole text, so readers that
missed pieces (those are few, and expire) get them from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from penstock.conversation import ToolCall
from penstock.errors import StreamRestartedError
from penstock.result import FinishReason, GenerateResult, Logprobs, Usage
from penstock.scripts import script

OnRestart = Literal["hide", "show"]
Part = Literal["text", "reasoning"]

MAX_PIECES: Final = 10_000
"""Kept pieces of a stream; a reader that is further behind gets the rest when the job has ended."""

APPEND: Final = script("append")
"""Adds a piece to a stream, and notes it on a channel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of an answer, in the order of the text.

    Attributes:
        text: new text, in whole characters. May be empty on the last piece, where a run begins again, and
            where the piece is of the reasoning.
        reasoning: new thoughts of the model; they come before all text.
        is_restart: the worker was lost and another one begins again: what came before is void. Only where
            the caller asked to see it.
        finish_reason: reason of the end, on the last piece, else None: `stop` if the model or a stop string
            ended it, `length` if a limit did.
        usage: tokens of prompt and answer, on the last piece, else None.
        tool_calls: calls of tools, on the last piece; see `GenerateResult`.
        logprobs: log-probabilities of the whole answer, on the last piece, if the request asked for them.
    """

    text: str
    reasoning: str = ""
    is_restart: bool = False
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    tool_calls: Sequence[ToolCall] | None = None
    logprobs: Logprobs | None = None


class Reader:
    """Makes one text of the pieces of one job, whoever wrote them.

    Pieces come at least once and in the order of a run; a run is one time that a worker generated. A worker
    that was thought dead may write on beside the one that took over: an earlier run is not read again.

    Args:
        job_id: id that errors name.
        on_restart: `hide` leaves out what a later run repeats; `show` tells of the restart.
    """

    def __init__(self, job_id: str, on_restart: OnRestart) -> None:
        self._job_id, self._on_restart = job_id, on_restart
        self._runs: list[str] = []
        self._n_read: dict[Part, int] = {}  # characters of this run
        self._seen: dict[Part, str] = {}  # all that the caller has

    def take(self, run: str, at: int, text: str, part: Part = "text") -> list[Piece]:
        """Return what an entry of the stream adds for the caller: at most a restart, and a piece.

        Raises:
            StreamRestartedError: restarts are to be hidden, and a later run says something else.
        """
        found = []
        if run not in self._runs:
            found = self._restart() if self._runs else []
            self._runs.append(run)
        elif run != self._runs[-1]:
            return []
        n_read = self._n_read.get(part, 0)
        if at > n_read:
            return found  # pieces between were dropped; the end of the job brings all
        self._n_read[part] = max(n_read, at + len(text))
        new = self._unseen(part, text[n_read - at :], n_read)
        return [*found, _piece(part, new)] if new else found

    def end(self, result: GenerateResult) -> list[Piece]:
        """Return what the stored result adds: the rest of the text, finish reason and usage.

        Raises:
            StreamRestartedError: see `take`.
        """
        found = []
        whole: dict[Part, str] = {"reasoning": result.reasoning or "", "text": result.text}
        if not all(text.startswith(self._seen.get(part, "")) for part, text in whole.items()):
            if self._on_restart == "hide":
                raise StreamRestartedError(self._job_id)
            found = self._restart()
        if thought := self._unseen("reasoning", whole["reasoning"], 0):
            found.append(_piece("reasoning", thought))
        return [
            *found,
            Piece(
                text=self._unseen("text", result.text, 0),
                finish_reason=result.finish_reason,
                usage=result.usage,
                tool_calls=result.tool_calls,
                logprobs=result.logprobs,
            ),
        ]

    def _restart(self) -> list[Piece]:
        self._n_read = {}
        if self._on_restart == "hide":
            return []
        self._seen = {}
        return [Piece(text="", is_restart=True)]

    def _unseen(self, part: Part, text: str, at: int) -> str:
        """Return what goes beyond what the caller has, of a text from character `at` of its part on."""
        had = self._seen.get(part, "")
        seen = had[at : at + len(text)]
        if not text.startswith(seen):
            raise StreamRestartedError(self._job_id)
        unseen = text[len(seen) :]
        self._seen[part] = had + unseen
        return unseen


def _piece(part: Part, new: str) -> Piece:
    return Piece(text=new) if part == "text" else Piece(text="", reasoning=new)
