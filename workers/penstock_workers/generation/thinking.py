"""Tell a model's reasoning from its answer, while tokens arrive."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Literal

from penstock_workers.batching.feed import Thought
from penstock_workers.generation.detokenizer import HALF_CHARACTER, Detokenizer
from penstock_workers.generation.stop_strings import TextStream

if TYPE_CHECKING:  # no more than a tokenizer's methods are used: tests have others, and load no torch
    from transformers import PreTrainedTokenizerBase

# Source: the chat templates of DeepSeek-R1, QwQ, Qwen3 and SmolLM3. In older turns they leave out line breaks
# behind either mark, and before the closing one, as is done here.
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
"""What the next token belongs to; `either`: it may begin the reasoning, or else the text."""


class ReasoningMarks:
    """The marks around reasoning, as one tokenizer has them.

    Args:
        tokenizer: the model's tokenizer.
        template: the model's chat template, which shows which marks it uses.

    Attributes:
        are_used: True if the template has any marks.
        open: opening mark, as text.
        close: closing mark, as text.
        open_id: token of the opening mark; None where it is several tokens, or does not exist.
        close_id: token of the closing mark; None as for `open_id`.
        channels: tokens of the harmony format by name, in which messages name their channel; empty in other
            formats.
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
        """Tokens that say what other tokens are."""
        return {i for i in (self.open_id, self.close_id, *self.channels.values()) if i is not None}

    def begin(self, ids: Sequence[int]) -> Stage:
        """Return what an answer begins with: prompts end with an opening mark, a closing one, or neither."""
        tail = str(self._tokenizer.decode(list(ids[-_TAIL_TOKENS:]), skip_special_tokens=False)).rstrip()
        if self.channels:
            header = tail.removesuffix(_MESSAGE).rpartition(_CHANNEL)[2].split()
            is_open = tail.endswith(_MESSAGE)
            return "either" if not is_open else "text" if header[:1] == [_FINAL] else "reasoning"
        return "reasoning" if tail.endswith(self.open) else "text" if tail.endswith(self.close) else "either"


class ReasoningParser:
    """Splits the tokens of one answer into reasoning and text.

    Args:
        detokenizer: the model's detokenizer.
        marks: marks of the model's tokenizer.
        stage: what the first token belongs to.
        stop: strings that end the text before them.
        on_piece: called with each new piece: a `Thought` for reasoning, a plain string for text.
        context: last tokens of a prompt whose text goes on; empty where a text begins.
        is_exact: the text is all that comes behind the reasoning, line breaks included.
        is_framed: messages may name their channel, where the model has tokens for that.

    Attributes:
        stage: part of the answer that the next token belongs to.
        reasoning: reasoning of the answer; None where there is none, or it has not ended.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        marks: ReasoningMarks,
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
        self._marks, self._stop, self._on_piece = marks, stop, on_piece
        self._is_exact = is_exact
        self._channels = {i: name for name, i in marks.channels.items()} if is_framed else {}
        self._decoder = detokenizer.begin(context)
        self._held = ""  # text that may become an opening mark
        self._header: str | None = None  # of a message that begins: its role and channel
        self._is_blank = False  # line breaks that come now belong to neither stage
        self._stream = TextStream(stop, on_piece, trim_if_cut=HALF_CHARACTER)
        if stage == "reasoning":
            self._begin_reasoning("")

    def add(self, token: int) -> str | None:
        """Add a token; return the whole text if a stop string is now complete."""
        if token in self._channels or self._header is not None:
            return self._route(token)
        if self.stage == "text" and self._stream.may_come_late:
            self._decoder.defer(token)
            return None
        if self.stage == "reasoning" and token == self._marks.close_id:
            self._read(self._decoder.end())
            return self._end_reasoning(self._stream.end(), "") if self.stage == "reasoning" else None
        if self.stage == "either" and token == self._marks.open_id and not self._held.strip():
            self._begin_reasoning("")
            return None
        return self._read(self._decoder.add((token,)))

    def add_mark(self, content: str) -> str | None:
        """Add a token that is not text, but part of a stop string; see `add`."""
        if self.stage == "reasoning":
            return None
        if self.stage == "either" and (text := self._begin_text()) is not None:
            return text
        return self._stream.add(content, is_shown=False)

    def skip_reasoning(self) -> None:
        """Take whatever comes next as text, not as an opening mark."""
        self.stage = "text"

    def end(self, *, is_cut_off: bool) -> str:
        """Return the whole text, without the half character that an answer may end in when it is cut off."""
        if (text := self._read(self._decoder.end())) is not None:
            return text
        if self.stage == "reasoning":
            self._end_reasoning(self._stream.end(is_cut_off=is_cut_off), "")
        if self.stage == "either" and (text := self._begin_text()) is not None:
            return text
        return self._stream.end(is_cut_off=is_cut_off)

    def flush(self, text: str) -> None:
        """Pass on what of the final text was not yet passed on."""
        self._stream.flush(text)

    def _route(self, token: int) -> str | None:
        """Add a token of a message's frame; return the whole text if it is complete."""
        name = self._channels.get(token)
        if name == _MESSAGE:
            words, self._header = (self._header or "").partition(_CHANNEL)[2].split(), None
            if self.stage == "either":
                self._begin_reasoning("")
            if words[:1] == [_FINAL] and self.stage == "reasoning":
                text = self._end_reasoning(self._stream.end(), "")
                self.reasoning = self.reasoning or None
                return text
            return None
        if self._header is None:
            self._header = ""
            if (text := self._read(self._decoder.end())) is not None:
                return text
            if self.stage == "either":
                self._begin_reasoning("")
            elif self.stage == "text":
                return self._stream.end()  # what follows its message is for others
        self._header += _CHANNEL if name == _CHANNEL else self._decoder.add((token,))
        return None

    def _read(self, text: str) -> str | None:
        """Add text that tokens became; return the whole text if a stop string is now complete."""
        if self._is_blank:
            text = text.lstrip(_BREAKS)
        if not text:
            return None
        self._is_blank = False
        if self.stage == "either":
            return self._find_opening_mark(text)
        said = self._stream.add(text)
        if said is None or self.stage == "text":
            return said
        return self._end_reasoning(said, self._stream.rest)

    def _find_opening_mark(self, text: str) -> str | None:
        self._held += text
        began = self._held.lstrip()
        if began.startswith(self._marks.open):
            return self._begin_reasoning(began.removeprefix(self._marks.open))
        return None if self._marks.open.startswith(began) else self._begin_text()

    def _begin_text(self) -> str | None:
        """Take what may have become an opening mark as text."""
        held, self._held, self.stage = self._held, "", "text"
        return self._stream.add(held)

    def _begin_reasoning(self, lead: str) -> str | None:
        on_piece = self._on_piece
        pass_on = None if on_piece is None else (lambda piece: on_piece(Thought(piece)))
        self.stage, self._is_blank, self._held = "reasoning", True, ""
        self._stream = TextStream(
            [] if self._channels else [self._marks.close], pass_on, trim=_BREAKS, trim_if_cut=HALF_CHARACTER
        )
        return self._read(lead)

    def _end_reasoning(self, reasoning: str, lead: str) -> str | None:
        self._stream.flush(reasoning)
        self.stage, self.reasoning = "text", reasoning
        self._stream = TextStream(self._stop, self._on_piece, trim_if_cut=HALF_CHARACTER)
        # A format's own text begins at a token's border.
        self._is_blank = not self._is_exact
        if not self._is_exact and not lead:
            self._decoder = self._decoder.restart()
        return None if self._is_exact else self._read(lead)
