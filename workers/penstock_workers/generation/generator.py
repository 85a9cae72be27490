"""Text from a causal language model: what a request becomes, and what its tokens become."""

import bisect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self
from uuid import uuid4

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from penstock.errors import (
    IncompleteOutputError,
    InputTooLongError,
    InvalidOptionError,
    InvalidTextError,
    ModelLoadError,
    PenstockError,
)
from penstock.request import GenerateRequest, GenerationOptions, Message, Tool, ToolCall
from penstock.result import FinishReason, Logprobs
from penstock.settings import ModelSettings
from penstock_workers.engines.device import free_bytes
from penstock_workers.engines.source import explain_failure, resolve_source
from penstock_workers.generation.causal_lm import (
    context_window,
    find_sharing,
    load_causal_lm,
    pause_between_layers,
)
from penstock_workers.generation.chat import Chat
from penstock_workers.generation.decoding import Decoding, Row
from penstock_workers.generation.detokenizer import Detokenizer
from penstock_workers.generation.generation_config import read_own_config
from penstock_workers.generation.grammar import Grammar, Grammars
from penstock_workers.generation.sampling import Sampling, Trail
from penstock_workers.generation.thinking import Speech, Stage

logger = logging.getLogger(__name__)

_DEFAULTS = GenerationOptions(max_new_tokens=256, stop=(), truncation="error")
_LEAST_ROOM_TOKENS = 64
_Encode = Callable[[Sequence[Message]], list[int]]
_MEMORY_SHARE = 4  # of the memory that is free: other models and processes want some too


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request, ready for the model.

    Attributes:
        ids: tokens of the whole conversation, the start of the answer included.
        sampling: how tokens are drawn.
        max_new_tokens: fits into the context window together with `ids`.
        context: its last tokens that are text, where the answer goes on from it; else a text begins.
        stop: strings that end the answer.
        stop_marks: of tokens that are no text, those that stand in `stop`, and their names.
        stop_token_ids: tokens that end the answer, besides the model's own.
        grammar: what the text has to follow, at its beginning; it alone then says where the answer ends.
        stage: what the answer begins with.
        is_chat: whether it is a chat template's.
        tools: that the model may call.
        cut_tokens: see `Usage`.
        n_choices: how many answers are wanted.
        n_likeliest: tokens whose log-probabilities are wanted beside the chosen one's; None wants none.
    """

    ids: tuple[int, ...]
    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]
    context: tuple[int, ...] = ()
    stop_marks: Mapping[int, str] = field(default_factory=dict)
    stop_token_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    stage: Stage = "text"
    is_chat: bool = True
    tools: Sequence[Tool] | None = None
    cut_tokens: int | None = None
    n_choices: int = 1
    n_likeliest: int | None = None

    @property
    def n_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.ids)

    def choices(self) -> list[Self]:
        """Return a prompt for each answer that is computed; one for all where they would be equal."""
        n = 1 if self.sampling.temperature == 0 else self.n_choices
        return [replace(self, sampling=self.sampling.choice(index)) for index in range(n)]

    def answers(self, found: Sequence["Answer"]) -> list["Answer"]:
        """Return as many answers as are wanted of those to `choices`."""
        return [*found] * (self.n_choices // len(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said.

    Attributes:
        text: the new text alone, cut before a stop string; special tokens left out.
        finish_reason: `stop` if the model, a stop string or a format ended it, `length` if the limit did.
        n_tokens: new tokens, those of a stop string counted, the end-of-sequence token not.
        reasoning: see `GenerateResult`.
        tool_calls: see `GenerateResult`.
        logprobs: of these tokens; None where the prompt wants none.
    """

    text: str
    finish_reason: FinishReason
    n_tokens: int
    reasoning: str | None = None
    tool_calls: Sequence[ToolCall] | None = None
    logprobs: Logprobs | None = None


class Generator:
    """A causal language model with its tokenizer.

    Attributes:
        name: the name it is served under.
        context_window: prompt and answer together, tokens.
        dtype: number format of the weights.
        sharing: how its requests share forward passes.
        marks: around what it thinks.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: GenerationOptions,
    ) -> None:
        self.name = name
        self.context_window = min(context_window(model, tokenizer), options.context_window or 1 << 62)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self._model, self._tokenizer, self._chat = model, tokenizer, Chat(tokenizer, name)
        self._n_vocab = model.config.get_text_config(decoder=True).vocab_size
        own = read_own_config(name, model.generation_config, self._n_vocab)
        self._defaults = options.over(own.options).over(_DEFAULTS)
        # as in transformers, only where nobody says how long an answer may be
        has_bound = options.max_new_tokens or own.options.max_new_tokens
        self._max_length = None if has_bound else own.max_length
        self.limits = own.limits
        # Chat models often name one more than their tokenizer.
        self._end_ids = own.end_ids | ({tokenizer.eos_token_id} - {None})
        self._grammars = Grammars(tokenizer, self._n_vocab, self._end_ids)
        self.marks = self._chat.marks
        self._hidden = {
            i: str(token)
            for i, token in tokenizer.added_tokens_decoder.items()
            if token.special and i not in self.marks.ids
        }
        if self._defaults.enable_thinking is not None:
            try:
                self._chat.find_switch(self._defaults.enable_thinking)
            except InvalidOptionError as error:
                raise ModelLoadError(name, f"generation.{error}") from None
        sharing, self._bytes_per_token = find_sharing(model)
        if sharing is None:
            raise ModelLoadError(
                name, "its logits are not finite, or those in a batch differ from those of a text alone"
            )
        self.sharing = sharing
        level = logging.INFO if sharing.joins else logging.WARNING
        logger.log(level, "requests to model %s share forward passes: %s", name, sharing)

    @cached_property
    def detokenizer(self) -> Detokenizer:
        """What its tokens say."""
        return Detokenizer(self._tokenizer)

    @classmethod
    def load(cls, name: str, model: ModelSettings, device: torch.device) -> Self:
        """Load the model that `model.source` names.

        Raises:
            ModelLoadError: the files are missing, damaged or no causal language model, or the model gives
                other logits token by token.
        """
        source = resolve_source(name, model)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # has no annotations
        try:
            return cls(name, *load_causal_lm(name, source, model, device), model.generation)
        except ModelLoadError:
            raise
        except Exception as error:
            raise explain_failure(name, error) from error

    def pause_between_layers(self, pause: Callable[[], None]) -> None:
        """Have `pause` called, in the model thread, wherever a forward pass can wait for a while."""
        pause_between_layers(self._model, pause)

    def prepare(self, request: GenerateRequest) -> Prompt:
        """Turn a request into tokens; safe to call from many threads.

        A `max_new_tokens` that the call set keeps its room in the context window. A default one
        shrinks to what the prompt leaves, though never below 64 tokens (or half a tiny window).

        Raises:
            InputTooLongError: the prompt leaves no room for the answer, after dropping what `truncation`
                allows to drop.
            InvalidFormatError: no answer can follow the format, or it is too complex to find out.
            RequestError: an option or the order of turns does not suit this model.
        """
        options = request.options().over(self._defaults)
        window = min(self.context_window, options.context_window or self.context_window)
        if self._max_length and request.max_new_tokens is None:
            window = min(window, self._max_length)
        wanted = options.max_new_tokens or 1
        room = wanted if request.max_new_tokens else min(wanted, _LEAST_ROOM_TOKENS, window // 2)
        if room >= window:
            allowed = f"prompt and answer share {window} tokens of {self.name}"
            raise InvalidOptionError("max_new_tokens", str(wanted), allowed)
        is_chat = request.mode == "chat"

        def encode(turns: Sequence[Message]) -> list[int]:
            if not is_chat:
                return self._chat.encode_text(turns[-1].content)
            return self._chat.encode(turns, tools=request.tools, enable_thinking=options.enable_thinking)

        ids, n_cut = self._fit(request.messages(), window - room, options, encode)
        if max(ids) >= self._n_vocab:  # would end the whole batch: some tokenizers know more than their model
            raise InvalidTextError(
                len(request.history), "or one before it holds a token that the model lacks"
            )
        grammar = self._grammars.compile(request.response_format) if request.response_format else None
        # A default that cut an answer short would break its format.
        stop = () if grammar else (*(options.stop or ()), *(self._chat.stop if is_chat else ()))
        # A chat's answer begins a text, and what it goes on from is not shown with it.
        goes_on = not is_chat or grammar is not None
        return Prompt(
            ids=tuple(ids),
            sampling=Sampling.resolve(options),
            max_new_tokens=min(wanted, window - len(ids)),
            context=self.detokenizer.context(ids, must=grammar is not None) if goes_on else (),
            stop=stop,
            stop_marks=self._marks_in(stop),
            stop_token_ids=frozenset(() if grammar else options.stop_token_ids or ()),
            grammar=grammar,
            stage=self._begin(ids, grammar) if is_chat and self.marks.are_used else "text",
            is_chat=is_chat,
            tools=request.tools,
            cut_tokens=n_cut or None,
            n_choices=request.n,
            n_likeliest=min(request.top_logprobs or 0, self._n_vocab) if request.logprobs else None,
        )

    def decoding(self, *, max_rows: int, budget_tokens: int | None = None) -> Decoding[Answer]:
        """Return an empty batch for `row`s.

        Args:
            max_rows: requests that are answered at a time.
            budget_tokens: bound of what the cache may allocate; None takes it from the memory that is free.
        """
        if budget_tokens is None:
            devices = {weight.device for weight in self._model.parameters()}
            # Layers, and with them the cache, are spread evenly: the fullest card decides.
            share = min(map(free_bytes, devices)) * len(devices) // _MEMORY_SHARE
            budget_tokens = share // self._bytes_per_token if self._bytes_per_token else 1 << 62
        return Decoding(self.name, self._model, self.sharing, max_rows=max_rows, budget_tokens=budget_tokens)

    def row(
        self,
        prompt: Prompt,
        *,
        is_over: Callable[[], bool] = lambda: False,
        on_start: Callable[[], None] = lambda: None,
        on_piece: Callable[[str], None] | None = None,
    ) -> Row[Answer]:
        """Return a prompt's row for a batch.

        Args:
            prompt: from `prepare`.
            is_over: asked between steps; once true, the row has left by the next one.
            on_start: called when its first forward pass begins.
            on_piece: called with each new piece of text, whole characters, no part of a stop string. The
                pieces are the answer's text.
        """
        answering = _Answering(self, prompt, on_piece)
        return Row(
            answering.trail, prompt.max_new_tokens, take=answering.take, is_over=is_over, on_start=on_start
        )

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer | PenstockError] | None]:
        """Answer prompts that are all there at once; closing the iterator gives the rest up.

        Yields:
            Index into `prompts` with its answer or its error, the moment it is known; None after each step.
        """
        decoding = self.decoding(max_rows=max(1, len(prompts)))
        places = {}
        for index, prompt in enumerate(prompts):
            decoding.add(row := self.row(prompt))
            places[row] = index
        while not decoding.is_idle:
            for row, outcome in decoding.step():
                yield places[row], outcome
            yield None

    def _begin(self, ids: Sequence[int], grammar: Grammar | None) -> Stage:
        stage = self.marks.begin(ids)
        # Where a format holds from the first token on, only a mark that is one token can be let in beside it.
        return "text" if stage == "either" and grammar and self.marks.open_id is None else stage

    def _fit(
        self, turns: list[Message], limit: int, options: GenerationOptions, encode: _Encode
    ) -> tuple[list[int], int]:
        """Return at most `limit` tokens, leaving out what may be and must be; and how many that are."""
        ids = encode(turns)
        n_whole = len(ids)
        if n_whole > limit and options.truncation == "oldest_turns":
            ids = self._drop_oldest(turns, limit, encode) or ids
        elif n_whole > limit and options.truncation == "middle":
            ids = self._cut_middle(turns, limit, encode, ids)
        if len(ids) > limit:
            raise InputTooLongError(self.name, len(ids), limit)
        return ids, n_whole - len(ids)

    def _cut_middle(self, turns: list[Message], limit: int, encode: _Encode, ids: list[int]) -> list[int]:
        """Cut the longest turn of user or tool, again and again, until all fits or nothing is left to cut."""
        lengths = {
            i: self._chat.n_tokens(t.content) for i, t in enumerate(turns) if t.role in ("user", "tool")
        }
        while len(ids) > limit:
            longest = max(lengths, key=lambda place: lengths[place])
            shorter = self._chat.cut_middle(turns[longest].content, len(ids) - limit)
            if shorter is None:
                break
            lengths[longest] = self._chat.n_tokens(shorter)
            turns = [*turns]
            turns[longest] = turns[longest].model_copy(update={"content": shorter})
            ids = encode(turns)
        return ids

    def _drop_oldest(self, turns: list[Message], limit: int, encode: _Encode) -> list[int]:
        """Return the tokens of the longest end of the conversation that fits, else of the shortest."""
        n_head = next(i for i, turn in enumerate(turns) if turn.role != "system")
        # An answer goes with its question: what is kept begins with a turn of the user.
        starts = [i for i in range(n_head + 1, len(turns)) if turns[i].role == "user"]

        def ids_from(start: int) -> list[int]:
            return encode([*turns[:n_head], *turns[start:]])

        best = bisect.bisect_left(starts, True, key=lambda start: len(ids_from(start)) <= limit)
        return ids_from(starts[min(best, len(starts) - 1)]) if starts else []

    def ends(self, token: int) -> bool:
        """Say whether a token ends the model's answers."""
        return token in self._end_ids

    def logprobs(self, trail: Trail, n_tokens: int) -> Logprobs | None:
        """Return what was noted of the first tokens of an answer."""
        if trail.n_likeliest is None:
            return None
        noted, width = trail.noted[:n_tokens], 1 + trail.n_likeliest
        ids = np.array([ids for ids, _ in noted], dtype=np.int32).reshape(-1, width)
        values = np.array([values for _, values in noted], dtype=np.float32).reshape(-1, width)
        # Characters that are bytes: JSON has no bytes, and most tokens then read as what they are.
        tokens = {str(i): self._bytes_of(i).decode("latin-1") for i in np.unique(ids).tolist()}
        return Logprobs(ids=ids, values=values, tokens=tokens)

    def _bytes_of(self, token: int) -> bytes:
        if self.shows(token) and (known := self._grammars.token_bytes(token)) is not None:
            return known
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False)).encode()

    def _marks_in(self, stop: Sequence[str]) -> dict[int, str]:
        """Return the tokens that are no text, and that a stop string names all the same."""
        if not stop:
            return {}
        return {i: name for i, name in self._hidden.items() if any(name in string for string in stop)}

    def shows(self, token: int) -> bool:
        """Say whether a token is text, or a mark of reasoning."""
        return token not in self._hidden

    def tool_calls(self, prompt: Prompt, tokens: list[int]) -> Sequence[ToolCall] | None:
        """Read the calls out of an answer; None where there are none, or nobody says how to read them."""
        if not prompt.tools or getattr(self._tokenizer, "response_template", None) is None:
            return None
        try:
            said = self._tokenizer.parse_response(tokens, prefix=list(prompt.ids), tools=list(prompt.tools))  # type: ignore[arg-type]  # plain dicts
            calls = [_own_call(call) for call in said.get("tool_calls") or ()]
        except Exception as error:  # noqa: BLE001  a foreign rule meets whatever a model writes
            logger.info("no calls could be read", extra={"model": self.name, "reason": type(error).__name__})
            return None
        return calls or None


class _Answering:
    """One answer while its tokens arrive."""

    def __init__(self, generator: Generator, prompt: Prompt, on_piece: Callable[[str], None] | None) -> None:
        self._grammar = prompt.grammar and prompt.grammar.begin()
        self.trail = Trail(
            sampling=prompt.sampling,
            prompt=prompt.ids,
            grammar=self._grammar,
            limits=generator.limits,
            n_likeliest=prompt.n_likeliest,
        )
        self._generator, self._prompt = generator, prompt
        self._speech = Speech(
            generator.detokenizer,
            generator.marks,
            prompt.stage,
            prompt.stop,
            on_piece,
            context=prompt.context,
            is_exact=self._grammar is not None,
            is_framed=prompt.is_chat,
        )
        self._bind()

    def take(self, token: int) -> Answer | None:
        """Take the newest token of the trail; return the answer if that ends it.

        Raises:
            IncompleteOutputError: the limit ends it, or the model while it still thinks, and its format does
                not end there.
            InvalidFormatError: its format is too complex to go on.
        """
        n_tokens = len(self.trail.tokens)
        if self._grammar and self._speech.stage == "either" and token != self._generator.marks.open_id:
            self._speech.speak()
        is_text = self._speech.stage != "reasoning"
        if self._grammar and self._speech.stage == "text":
            self._grammar.take(token)
        if self._generator.ends(token) or (is_text and token in self._prompt.stop_token_ids):
            return self._answer(self._speech.end(is_cut_off=False), "stop", n_tokens - 1)
        if (text := self._read(token)) is not None:
            return self._answer(text, "stop", n_tokens)
        if self._grammar and self._grammar.is_over:
            return self._answer(self._speech.end(is_cut_off=False), "stop", n_tokens)
        if n_tokens == self._prompt.max_new_tokens:
            return self._answer(self._speech.end(is_cut_off=True), "length", n_tokens)
        self._bind()
        return None

    def _read(self, token: int) -> str | None:
        """Let a token be heard; return the whole text if a stop string is now complete."""
        if self._generator.shows(token):
            return self._speech.add(token)
        name = self._prompt.stop_marks.get(token)
        return None if name is None else self._speech.add_mark(name)

    def _bind(self) -> None:
        """Let the next token follow the format, if it is one of the text."""
        self.trail.grammar = self._grammar if self._speech.stage == "text" else None
        if self._grammar and self._speech.stage == "either":
            self.trail.grammar = self._grammar.beside(self._generator.marks.open_id)

    def _answer(self, text: str, finish_reason: FinishReason, n_tokens: int) -> Answer:
        if self._grammar:
            if not self._grammar.is_complete:
                raise IncompleteOutputError(n_tokens, text)
            self._grammar.check(text)
        self._speech.tell_rest(text)
        return Answer(
            text=text,
            finish_reason=finish_reason,
            n_tokens=n_tokens,
            reasoning=self._speech.reasoning,
            tool_calls=self._generator.tool_calls(self._prompt, self.trail.tokens),
            logprobs=self._generator.logprobs(self.trail, n_tokens),
        )


def _own_call(call: Mapping[str, Any]) -> ToolCall:
    """Return a call as transformers reads it, in OpenAI's form."""
    function = call["function"]
    arguments = function.get("arguments") or {}
    return {
        # Nine letters and digits: Mistral's templates take nothing else when it comes back.
        "id": uuid4().hex[:9],
        "type": "function",
        "function": {
            "name": str(function["name"]),
            "arguments": arguments
            if isinstance(arguments, str)
            else json.dumps(arguments, ensure_ascii=False),
        },
    }
