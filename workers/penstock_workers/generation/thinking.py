"""What a model thinks before it answers, told apart from the answer while tokens arrive."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Literal

from penstock_workers.generation.detokenizer import HALF_CHARACTER, Detokenizer
from penstock_workers.generation.stop_strings import Wording

if TYPE_CHECKING:  # the tasks import this file, and transformers loads with the first model
    from transformers import PreTrainedTokenizerBase

# Source: the chat templates of DeepSeek-R1, QwQ, Qwen3 and SmolLM3. They leave line breaks between the marks
# and what is inside or behind out of older turns, as is done here.
PAIRS: Final = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker
    ("◁think▷", "◁/think▷"),  # Kimi
)
# Source: OpenAI's harmony format, github.com/openai/harmony: the channel `final` is what users see.
_START, _CHANNEL, _MESSAGE, _END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
_FINAL: Final = "final"
_BREAKS: Final = "\n"
_TAIL_TOKENS: Final = 16

Stage = Literal["either", "reasoning", "text"]
"""What the next token is of; `either`: it may begin the reasoning, or else the text."""


class Thought(str):
    """A piece of reasoning, where a piece of text is a plain string."""

    __slots__ = ()


class Marks:
    """The marks around reasoning, as one tokenizer has them.

    Args:
        tokenizer: of the model.
        template: its chat template, which shows which marks these are.

    Attributes:
        are_used: whether the template knows any.
        open, close: as text.
        open_id: the token that is the opening mark; None where it is several, or does not exist.
        close_id: the same of the closing one.
        channels: tokens of the harmony format, by name: messages then say what they are; empty in others.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str = "") -> None:
        self._tokenizer = tokenizer
        added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
        found = next((pair for pair in PAIRS if pair[1] in template), None)
        self.open, self.close = found or PAIRS[0]
        self.open_id, self.close_id = added.get(self.open), added.get(self.close)
        names = (_START, _CHANNEL, _MESSAGE, _END)
        is_harmony = _MESSAGE in template and all(name in added for name in names)
        self.channels = {name: added[name] for name in names} if is_harmony else {}
        if is_harmony:
            self.open_id, self.close_id = added[_CHANNEL], None
        self.are_used = found is not None or is_harmony

    @property
    def ids(self) -> set[int]:
        """Tokens that say what others are."""
        return {i for i in (self.open_id, self.close_id, *self.channels.values()) if i is not None}

    def begin(self, ids: Sequence[int]) -> Stage:
        """Say where the answer to a prompt begins: templates open the reasoning, or close it, or neither."""
        tail = str(self._tokenizer.decode(list(ids[-_TAIL_TOKENS:]), skip_special_tokens=False)).rstrip()
        if self.channels:
            header = tail.removesuffix(_MESSAGE).rpartition(_CHANNEL)[2].split()
            is_open = tail.endswith(_MESSAGE)
            return "either" if not is_open else "text" if header[:1] == [_FINAL] else "reasoning"
        return "reasoning" if tail.endswith(self.open) else "text" if tail.endswith(self.close) else "either"


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
        is_framed: messages may say what they are, where the model has tokens for that.

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
        is_framed: bool = True,
    ) -> None:
        self.stage: Stage = stage
        self.reasoning: str | None = None
        self._detokenizer, self._marks, self._stop, self._on_piece = detokenizer, marks, stop, on_piece
        self._is_exact = is_exact
        self._channels = marks.channels if is_framed else {}
        self._frame = frozenset(self._channels.values())
        self._spelling = detokenizer.begin(context)
        self._waiting: list[int] = []  # tokens that nobody has to read yet
        self._held = ""  # what may become an opening mark
        self._header: str | None = None  # of a message that begins: names of who speaks, and where
        self._is_blank = False  # line breaks that come now are neither's
        self._words = Wording(stop, on_piece, loose=HALF_CHARACTER)
        if stage == "reasoning":
            self._think("")

    def add(self, token: int) -> str | None:
        """Take a token; return the whole text if a stop string is now complete."""
        if token in self._frame or self._header is not None:
            return self._route(token)
        if self.stage == "text" and self._words.is_deaf:
            self._waiting.append(token)
            return None
        if self.stage == "reasoning" and token == self._marks.close_id:
            self._hear(self._spelling.end())
            return self._speak(self._words.end(), "") if self.stage == "reasoning" else None
        if self.stage == "either" and token == self._marks.open_id and not self._held.strip():
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

    def _route(self, token: int) -> str | None:
        """Take a token of a message's frame; return the whole text if it is complete."""
        if token == self._channels[_MESSAGE]:
            words, self._header = (self._header or "").partition(_CHANNEL)[2].split(), None
            if self.stage == "either":
                self._think("")
            if words[:1] == [_FINAL] and self.stage == "reasoning":
                text = self._speak(self._words.end(), "")
                self.reasoning = self.reasoning or None
                return text
            return None
        if self._header is None:
            rest = self._spelling.add(self._waiting) + self._spelling.end()
            self._waiting, self._header = [], ""
            if (text := self._hear(rest)) is not None:
                return text
            if self.stage == "either":
                self._think("")
            elif self.stage == "text":
                return self._words.end()  # what follows its message is for others
        self._header += _CHANNEL if token == self._channels[_CHANNEL] else self._spelling.add((token,))
        return None

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
        if began.startswith(self._marks.open):
            return self._think(began.removeprefix(self._marks.open))
        return None if self._marks.open.startswith(began) else self._begin_text()

    def _begin_text(self) -> str | None:
        held, self._held, self.stage = self._held, "", "text"
        return self._words.add(held)

    def _think(self, lead: str) -> str | None:
        on_piece = self._on_piece
        tell = None if on_piece is None else (lambda piece: on_piece(Thought(piece)))
        self.stage, self._is_blank, self._held = "reasoning", True, ""
        self._words = Wording(
            [] if self._frame else [self._marks.close], tell, trims=_BREAKS, loose=HALF_CHARACTER
        )
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
