"""An answer's text while it comes: stop strings that span its pieces, and what may be passed on."""

from collections.abc import Callable, Sequence


class Wording:
    """The text of one answer.

    Args:
        stop: strings that end the answer before them.
        on_piece: called with each new piece of text: nothing that may still turn out to be the beginning of
            a stop string. All pieces together are the text that `end` returns.
        trims: characters that are left out at the end.
        loose: characters that are left out at the end of an answer that is cut off.
    """

    def __init__(
        self,
        stop: Sequence[str],
        on_piece: Callable[[str], None] | None = None,
        *,
        trims: str = "",
        loose: str = "",
    ) -> None:
        self._stop, self._on_piece, self._trims, self._loose = tuple(stop), on_piece, trims, trims + loose
        self._longest = max(map(len, self._stop), default=0)
        self._sure: list[str] = []  # text that stays
        self._held = ""  # what follows it: the last characters may begin a stop string, or be trimmed
        self._unseen: list[tuple[int, int]] = []  # where in `_held` is what is no text
        self._n_told = 0
        self.rest = ""  # what came behind a stop string

    @property
    def is_deaf(self) -> bool:
        """Whether nothing depends on when text comes."""
        return not self._stop and self._on_piece is None

    def add(self, text: str, *, is_seen: bool = True) -> str | None:
        """Take new text; return all of it if a stop string is now complete, what is behind that in `rest`.

        Args:
            text: what is new.
            is_seen: whether it is text; else it can be part of a stop string alone.
        """
        if not is_seen:
            self._unseen.append((len(self._held), len(self._held) + len(text)))
        self._held += text
        places = [(at + len(string), at) for string in self._stop if (at := self._held.find(string)) >= 0]
        if places:
            # The one that is complete first, however long a piece: tokens make no difference to the text.
            end, start = min(places)
            self.rest = self._held[end:]
            self._held = self._held[:start]
            return self.end()
        if n_sure := self._n_sure():
            self._settle(n_sure)
        return None

    def end(self, *, is_cut_off: bool = False) -> str:
        """Return the whole text."""
        text = "".join([*self._sure, self._text(len(self._held))])
        trims = self._loose if is_cut_off else self._trims
        return text.rstrip(trims) if trims else text

    def tell_rest(self, text: str) -> None:
        """Pass on what of the final text was not yet passed on."""
        self._tell(text[self._n_told :])

    def _settle(self, n_sure: int) -> None:
        """Let the first characters of what is held be text that stays."""
        text = self._text(n_sure)
        self._held = self._held[n_sure:]
        self._unseen = [(start - n_sure, end - n_sure) for start, end in self._unseen if end > n_sure]
        self._sure.append(text)
        self._tell(text)

    def _text(self, n_characters: int) -> str:
        """Return the text in so many characters of what is held."""
        if not self._unseen:
            return self._held[:n_characters]
        seen, at = [], 0
        for start, end in self._unseen:
            seen.append(self._held[max(at, 0) : max(min(start, n_characters), 0)])
            at = end
        return "".join([*seen, self._held[at:n_characters]])

    def _n_sure(self) -> int:
        """Return how many of the held characters stay."""
        n_sure = len(self._held)
        for n in range(min(self._longest - 1, n_sure), 0, -1):
            if any(string.startswith(self._held[-n:]) for string in self._stop):
                n_sure -= n
                break
        while n_sure and self._held[n_sure - 1] in self._loose:
            n_sure -= 1
        return n_sure

    def _tell(self, piece: str) -> None:
        if self._on_piece is not None and piece:
            self._on_piece(piece)
            self._n_told += len(piece)
