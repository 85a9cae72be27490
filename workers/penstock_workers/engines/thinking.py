"""What a model thinks before it answers, told apart from the answer while tokens arrive."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Literal

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
        decode: turns tokens into text.
        marks: of the model's tokenizer.
        stage: what the first token is of.
        stop: strings that end the text before them.
        on_piece: called with each new piece: of the reasoning, a `Thought`, or of the text.
        is_exact: the text is all that comes behind the reasoning, line breaks too.

    Attributes:
        stage: what the next token is of.
        reasoning: None where there is none, or not yet all.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        marks: Marks,
        stage: Stage,
        stop: Sequence[str],
        on_piece: Callable[[str], None] | None,
        *,
        is_exact: bool = False,
    ) -> None:
        self.stage: Stage = stage
        self.reasoning: str | None = None
        self._decode, self._marks, self._stop, self._on_piece = decode, marks, stop, on_piece
        self._is_exact = is_exact
        self._held: list[int] = []
        self._is_blank = False  # line breaks that come now are neither's
        self._words = Wording(decode, stop, on_piece)
        if stage == "reasoning":
            self._think("")

    def add(self, token: int) -> str | None:
        """Take a token; return the whole text if a stop string is now complete."""
        if self.stage == "either":
            return self._begin(token)
        if self.stage == "reasoning" and token == self._marks.close_id:
            self._speak(self._words.end(is_cut_off=False), "")
            return None
        if self._is_blank and not self._decode([token]).strip(_BREAKS):
            return None
        self._is_blank = False
        said = self._words.add(token)
        if said is None or self.stage == "text":
            return said
        self._speak(said, self._words.whole.partition(CLOSE)[2])
        return None

    def speak(self) -> None:
        """Take what comes for the text, whatever it is."""
        self.stage = "text"

    def end(self, *, is_cut_off: bool) -> str:
        """Return the whole text; what was cut off may end in half a character, which is left out."""
        if self.stage == "reasoning":
            self._speak(self._words.end(is_cut_off=is_cut_off), "")
        held, self._held = self._held, []
        for token in held:
            if (text := self._words.add(token)) is not None:
                return text
        return self._words.end(is_cut_off=is_cut_off)

    def tell_rest(self, text: str) -> None:
        """Pass on what of the final text was not yet passed on."""
        self._words.tell_rest(text)

    def _begin(self, token: int) -> str | None:
        self._held.append(token)
        began = OPEN if token == self._marks.open_id else self._decode(self._held).lstrip()
        if began.startswith(OPEN):
            self._held = []
            self._think(began.removeprefix(OPEN))
        elif not OPEN.startswith(began):
            held, self._held, self.stage = self._held, [], "text"
            for one in held:
                if (text := self._words.add(one)) is not None:
                    return text
        return None

    def _think(self, lead: str) -> None:
        on_piece = self._on_piece
        tell = None if on_piece is None else (lambda piece: on_piece(Thought(piece)))
        lead = lead.lstrip(_BREAKS)
        self.stage, self._is_blank = "reasoning", not lead
        self._words = Wording(self._decode, [CLOSE], tell, lead=lead, trims=_BREAKS)

    def _speak(self, reasoning: str, lead: str) -> None:
        self._words.tell_rest(reasoning)
        # A format's own text begins at a token's border.
        lead = "" if self._is_exact else lead.lstrip(_BREAKS)
        self.stage, self._is_blank, self.reasoning = "text", not (lead or self._is_exact), reasoning
        self._words = Wording(self._decode, self._stop, self._on_piece, lead=lead)
