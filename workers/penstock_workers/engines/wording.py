"""An answer's text while its tokens arrive: stop strings that span them, and pieces of whole characters."""

from collections.abc import Callable, Sequence

_WINDOW_TOKENS = 16
_HALF_CHARACTER = "\ufffd"  # what a decoder puts for bytes that are no whole character, or not yet


class Wording:
    """The text of one answer.

    Args:
        decode: turns tokens into text.
        stop: strings that end the answer before them.
        on_piece: called with each new piece of text: whole characters, and nothing that may still turn out
            to be the beginning of a stop string. All pieces together are the text that `end` returns.
        lead: text before that of the first token.
        trims: characters that are left out at the end.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Sequence[str],
        on_piece: Callable[[str], None] | None = None,
        *,
        lead: str = "",
        trims: str = "",
    ) -> None:
        self._decode, self._stop, self._on_piece = decode, tuple(stop), on_piece
        self._lead, self._trims = lead, trims
        self._longest = max(map(len, self._stop), default=0)
        self._ids: list[int] = []
        self._text = lead  # whole characters so far
        self._n_told = 0
        # Only the last tokens are decoded at each step: those from `_first` on, whose text so far
        # has `_n_known` characters.
        self._first = self._n_known = 0

    def add(self, token: int) -> str | None:
        """Take a token; return the whole text if a stop string is now complete."""
        self._ids.append(token)
        if not self._stop and self._on_piece is None:
            return None
        tail = self._decode(self._ids[self._first :])
        whole = tail.rstrip(_HALF_CHARACTER)
        n_before = len(self._text)
        if len(whole) > self._n_known:
            self._text += whole[self._n_known :]
            self._n_known = len(whole)
        if len(self._ids) - self._first >= 2 * _WINDOW_TOKENS and whole == tail:
            self._first = len(self._ids) - _WINDOW_TOKENS
            self._n_known = len(self._decode(self._ids[self._first :]))
        if self._cut(self._text, max(0, n_before - self._longest)) is not None:
            # Decoding piece by piece and as a whole may differ; the whole is what counts.
            text = self.whole
            if (end := self._cut(text, 0)) is not None:
                return text[:end].rstrip(self._trims) if self._trims else text[:end]
        self._tell(self._text, self._n_sure())
        return None

    @property
    def whole(self) -> str:
        """All of the text, what is behind a stop string included."""
        return self._lead + self._decode(self._ids)

    def end(self, *, is_cut_off: bool) -> str:
        """Return the whole text; one that was cut off may end in half a character, which is left out."""
        loose = self._trims + (_HALF_CHARACTER if is_cut_off else "")
        return self.whole.rstrip(loose) if loose else self.whole

    def tell_rest(self, text: str) -> None:
        """Pass on what of the final text was not yet passed on."""
        self._tell(text, len(text))

    def _cut(self, text: str, start: int) -> int | None:
        return min((at for string in self._stop if (at := text.find(string, start)) >= 0), default=None)

    def _n_sure(self) -> int:
        """Return how many characters stay: the last ones may begin a stop string, or be trimmed."""
        n_sure = len(self._text)
        for n in range(min(self._longest - 1, len(self._text)), 0, -1):
            if any(string.startswith(self._text[-n:]) for string in self._stop):
                n_sure -= n
                break
        while n_sure and self._text[n_sure - 1] in self._trims:
            n_sure -= 1
        return n_sure

    def _tell(self, text: str, end: int) -> None:
        if self._on_piece is not None and end > self._n_told:
            self._on_piece(text[self._n_told : end])
            self._n_told = end
