"""Find stop strings in an answer's text while it comes, and pass on what cannot begin one."""

from collections.abc import Callable, Sequence


class TextStream:
    """The text of one answer, or of its reasoning.

    Args:
        stop: strings that end the text before them.
        on_piece: called with each new piece of text, but not with what may still turn out to begin a stop
            string. All pieces together are the text that `end` returns.
        trim: characters that are left out at the end.
        trim_if_cut: further characters that are left out at the end of a text that is cut off.
    """

    def __init__(
        self,
        stop: Sequence[str],
        on_piece: Callable[[str], None] | None = None,
        *,
        trim: str = "",
        trim_if_cut: str = "",
    ) -> None:
        self._stop, self._on_piece = tuple(stop), on_piece
        self._trim, self._trim_if_cut = trim, trim + trim_if_cut
        self._longest = max(map(len, self._stop), default=0)
        self._settled: list[str] = []  # text that stays
        self._held = ""  # what follows it: the last characters may begin a stop string, or be trimmed
        self._hidden: list[tuple[int, int]] = []  # where in `_held` is what is no text
        self._n_passed = 0
        self.rest = ""  # what came behind a stop string

    @property
    def may_come_late(self) -> bool:
        """Whether nothing depends on when text comes: there is no stop string, and nobody listens."""
        return not self._stop and self._on_piece is None

    def add(self, text: str, *, is_shown: bool = True) -> str | None:
        """Add new text.

        Args:
            text: what is new.
            is_shown: whether it is text; otherwise it can only be part of a stop string.

        Returns:
            The whole text if a stop string is now complete, and what came behind that in `rest`; else None.
        """
        if not is_shown:
            self._hidden.append((len(self._held), len(self._held) + len(text)))
        self._held += text
        places = [(at + len(string), at) for string in self._stop if (at := self._held.find(string)) >= 0]
        if places:
            # The one that is complete first, however long a piece: tokens make no difference to the text.
            end, start = min(places)
            self.rest = self._held[end:]
            self._held = self._held[:start]
            return self.end()
        if n_settled := self._n_settled():
            self._settle(n_settled)
        return None

    def end(self, *, is_cut_off: bool = False) -> str:
        """Return the whole text."""
        text = "".join([*self._settled, self._text(len(self._held))])
        trim = self._trim_if_cut if is_cut_off else self._trim
        return text.rstrip(trim) if trim else text

    def flush(self, text: str) -> None:
        """Pass on what of the final text was not yet passed on."""
        self._pass_on(text[self._n_passed :])

    def _settle(self, n_characters: int) -> None:
        """Move the first characters of what is held to the text that stays."""
        text = self._text(n_characters)
        self._held = self._held[n_characters:]
        self._hidden = [
            (start - n_characters, end - n_characters) for start, end in self._hidden if end > n_characters
        ]
        self._settled.append(text)
        self._pass_on(text)

    def _text(self, n_characters: int) -> str:
        """Return the text in the first characters of what is held."""
        if not self._hidden:
            return self._held[:n_characters]
        shown, at = [], 0
        for start, end in self._hidden:
            shown.append(self._held[max(at, 0) : max(min(start, n_characters), 0)])
            at = end
        return "".join([*shown, self._held[at:n_characters]])

    def _n_settled(self) -> int:
        """Return how many of the held characters stay."""
        n = len(self._held)
        for n_begun in range(min(self._longest - 1, n), 0, -1):
            if any(string.startswith(self._held[-n_begun:]) for string in self._stop):
                n -= n_begun
                break
        while n and self._held[n - 1] in self._trim_if_cut:
            n -= 1
        return n

    def _pass_on(self, piece: str) -> None:
        if self._on_piece is not None and piece:
            self._on_piece(piece)
            self._n_passed += len(piece)
