"""What a model thinks before it answers, told apart from the answer while tokens arrive."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Literal

from penstock_workers.engines.detokenizing import HALF_CHARACTER, Detokenizer
from penstock_workers.engines.wording import Wording

if TYPE_CHECKING:  # the tasks import this file, and transformers loads with the first model
    from transformers import PreTrainedTokenizerBase

# Source: the chat templates of DeepSeek-R1, QwQ, Qwen3 and SmolLM3. They leave line breaks between the marks
# and what is inside or behind out of older turns, as is done here.
OPEN: Final = "<think>"
CLOSE: Final = "</think>"
_BREAKS: Final = "\n"
_TAIL_TOKENS: Final = 16

Stage = Literal["either", "reasoning", "text"]
"""What the next token is of; `either`: it may begin the reasoning, or else the text."""


class Thought(str):
    """A piece of reasoning, where a piece of text is a plain string."""

    __slots__ = ()


class Marks:
    """The marks around reasoning, as one tokenizer has them.

    Attributes:
        open_id: the token that is the opening mark; None where it is several, or does not exist.
        close_id: the same of the closing one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
        self.open_id, self.close_id = added.get(OPEN), added.get(CLOSE)

    def begin(self, ids: Sequence[int]) -> Stage:
        """Say where the answer to a prompt begins: templates open the reasoning, or close it, or neither."""
        tail = str(self._tokenizer.decode(list(ids[-_TAIL_TOKENS:]), skip_special_tokens=False)).rstrip()
        return "reasoning" if tail.endswith(OPEN) else "text" if tail.endswith(CLOSE) else "either"


class Speech:
    """Reasoning and text of one answer.

    Args:
        detokenizer: of the model.
        marks: of the model's tokenizer.
        stage: what the first token is of.
        stop: strings that end the text before them.
        on_piece: called with each new piece: of the reasoning, a `Thought`, or of the text.
        context: the last tokens of a prompt whose text goes on; without, a text begins.
        is_exact: the text is all that comes behind the reasoning, line breaks too.

    Attributes:
        stage: what the next token is of.
        reasoning: None where there is none, or not yet all.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        marks: Marks,
        stage: Stage,
        stop: Sequence[str],
        on_piece: Callable[[str], None] | None,
        *,
        context: Sequence[int] = (),
        is_exact: bool = False,
    ) -> None:
        self.stage: Stage = stage
        self.reasoning: str | None = None
        self._detokenizer, self._marks, self._stop, self._on_piece = detokenizer, marks, stop, on_piece
        self._is_exact = is_exact
        self._spelling = detokenizer.begin(context)
        self._waiting: list[int] = []  # tokens that nobody has to read yet
        self._held = ""  # what may become an opening mark
        self._is_blank = False  # line breaks that come now are neither's
        self._words = Wording(stop, on_piece, loose=HALF_CHARACTER)
        if stage == "reasoning":
            self._think("")

    def add(self, token: int) -> str | None:
        """Take a token; return the whole text if a stop string is now complete."""
        if self.stage == "text" and self._words.is_deaf:
            self._waiting.append(token)
            return None
        if self.stage == "reasoning" and token == self._marks.close_id:
            self._hear(self._spelling.end())
            return self._speak(self._words.end(), "") if self.stage == "reasoning" else None
        if self.stage == "either" and token == self._marks.open_id:
            self._think("")
            return None
        return self._hear(self._spelling.add((token,)))

    def add_mark(self, content: str) -> str | None:
        """Take a token that is no text, and part of a stop string; else as `add`."""
        if self.stage == "reasoning":
            return None
        if self.stage == "either" and (text := self._begin_text()) is not None:
            return text
        return self._words.add(content, is_seen=False)

    def speak(self) -> None:
        """Take what comes for the text, whatever it is."""
        self.stage = "text"

    def end(self, *, is_cut_off: bool) -> str:
        """Return the whole text; what was cut off may end in half a character, which is left out."""
        rest = self._spelling.add(self._waiting) + self._spelling.end()
        self._waiting = []
        if (text := self._hear(rest)) is not None:
            return text
        if self.stage == "reasoning":
            self._speak(self._words.end(is_cut_off=is_cut_off), "")
        if self.stage == "either" and (text := self._begin_text()) is not None:
            return text
        return self._words.end(is_cut_off=is_cut_off)

    def tell_rest(self, text: str) -> None:
        """Pass on what of the final text was not yet passed on."""
        self._words.tell_rest(text)

    def _hear(self, text: str) -> str | None:
        """Take what tokens say."""
        if self._is_blank:
            text = text.lstrip(_BREAKS)
        if not text:
            return None
        self._is_blank = False
        if self.stage == "either":
            return self._begin(text)
        said = self._words.add(text)
        if said is None or self.stage == "text":
            return said
        return self._speak(said, self._words.rest)

    def _begin(self, text: str) -> str | None:
        self._held += text
        began = self._held.lstrip()
        if began.startswith(OPEN):
            return self._think(began.removeprefix(OPEN))
        return None if OPEN.startswith(began) else self._begin_text()

    def _begin_text(self) -> str | None:
        held, self._held, self.stage = self._held, "", "text"
        return self._words.add(held)

    def _think(self, lead: str) -> str | None:
        on_piece = self._on_piece
        tell = None if on_piece is None else (lambda piece: on_piece(Thought(piece)))
        self.stage, self._is_blank, self._held = "reasoning", True, ""
        self._words = Wording([CLOSE], tell, trims=_BREAKS, loose=HALF_CHARACTER)
        return self._hear(lead)

    def _speak(self, reasoning: str, lead: str) -> str | None:
        self._words.tell_rest(reasoning)
        self.stage, self.reasoning = "text", reasoning
        self._words = Wording(self._stop, self._on_piece, loose=HALF_CHARACTER)
        # A format's own text begins at a token's border.
        self._is_blank = not self._is_exact
        if not self._is_exact and not lead:
            self._spelling = self._detokenizer.begin()
        return None if self._is_exact else self._hear(lead)
