"""Why a request to a server has no usable answer, and so what is to be done about it."""

from typing import Literal

from penstock.errors import PenstockError

FaultKind = Literal["refused", "item", "size", "busy", "failed", "broken"]


class Fault(Exception):  # noqa: N818  never reaches a caller: `error` does
    """A request without a usable answer.

    Attributes:
        kind: `refused`: no request would do better; `item`: one of its items is to blame; `size`: it was too
            large as a whole; `busy`: the server asks for a pause; `failed`: it may do better next time;
            `broken`: the same, but a part of the answer was passed on.
        error: Error that callers get if nothing else is tried.
        retry_after_s: Pause that the server asks for, seconds; None if it does not say.
    """

    def __init__(self, kind: FaultKind, error: PenstockError, retry_after_s: float | None = None) -> None:
        super().__init__(kind, error)
        self.kind, self.error, self.retry_after_s = kind, error, retry_after_s
