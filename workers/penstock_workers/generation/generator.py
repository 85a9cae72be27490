"""A causal language model with its tokenizer: requests become prompts, prompts become rows of a batch."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from penstock.conversation import Message
from penstock.errors import InvalidOptionError, InvalidTextError, ModelLoadError, PenstockError
from penstock.request import GenerateRequest, GenerationOptions
from penstock_workers.batching.feed import Answer
from penstock_workers.checkpoint.failures import explained
from penstock_workers.checkpoint.source import resolve_source
from penstock_workers.generation.answering import Answering
from penstock_workers.generation.chat import Chat
from penstock_workers.generation.decoding import Decoding
from penstock_workers.generation.generation_config import read_own_config
from penstock_workers.generation.grammar import Grammar
from penstock_workers.generation.loading import context_window, load_causal_lm, pause_between_layers
from penstock_workers.generation.mode_trial import find_batch_mode
from penstock_workers.generation.prompt import Prompt, StopConditions
from penstock_workers.generation.sampling_params import SamplingParams
from penstock_workers.generation.sequence import ScheduledSequence
from penstock_workers.generation.thinking import Stage
from penstock_workers.generation.truncation import fit
from penstock_workers.generation.vocabulary import Vocabulary
from penstock_workers.hardware.device import free_bytes
from penstock_workers.settings import ModelSettings

logger = logging.getLogger(__name__)

_DEFAULTS = GenerationOptions(max_new_tokens=256, stop=(), truncation="error")
_MIN_ANSWER_TOKENS = 64
_MEMORY_SHARE = 4  # of the memory that is free: other models and processes want some too


class Generator:
    """A causal language model with its tokenizer.

    Attributes:
        name: name that it is served under.
        context_window: most tokens of prompt and answer together.
        dtype: number format of the weights.
        batch_mode: way in which its requests share forward passes.
        vocabulary: meaning of its tokens.
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
        self._model, self._chat = model, Chat(tokenizer, name)
        self._n_vocab = model.config.get_text_config(decoder=True).vocab_size
        own = read_own_config(name, model.generation_config, self._n_vocab)
        self._defaults = options.over(own.options).over(_DEFAULTS)
        # as in transformers, only where nobody says how long an answer may be
        has_bound = options.max_new_tokens or own.options.max_new_tokens
        self._max_length = None if has_bound else own.max_length
        self._forbidden = own.forbidden
        # Chat models often name one more than their tokenizer.
        end_ids = own.end_ids | ({tokenizer.eos_token_id} - {None})
        self.vocabulary = Vocabulary(name, tokenizer, self._chat.marks, self._n_vocab, end_ids)
        if self._defaults.enable_thinking is not None:
            try:
                self._chat.find_switch(self._defaults.enable_thinking)
            except InvalidOptionError as error:
                raise ModelLoadError(name, f"generation.{error}") from None
        mode, self._bytes_per_token = find_batch_mode(model)
        if mode is None:
            raise ModelLoadError(
                name, "its logits are not finite, or those in a batch differ from those of a text alone"
            )
        self.batch_mode = mode
        level = logging.INFO if mode.is_continuous else logging.WARNING
        logger.log(level, "requests to model %s share forward passes: %s", name, mode)

    @classmethod
    def load(cls, name: str, model: ModelSettings, device: torch.device) -> Self:
        """Load the model that `model.source` names.

        Raises:
            ModelLoadError: the files are missing, damaged or no causal language model, or the model gives
                other logits token by token.
        """
        source = resolve_source(name, model)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # has no annotations
        with explained(name):
            return cls(name, *load_causal_lm(name, source, model, device), model.generation)

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
        window, room = self._divide_window(request, options)
        is_chat = request.mode == "chat"

        def encode(turns: Sequence[Message]) -> list[int]:
            if not is_chat:
                return self._chat.encode_text(turns[-1].content)
            return self._chat.encode(turns, tools=request.tools, enable_thinking=options.enable_thinking)

        ids, n_cut = fit(self.name, self._chat, request.messages(), window - room, options, encode)
        if max(ids) >= self._n_vocab:  # would end the whole batch: some tokenizers know more than their model
            raise InvalidTextError(
                len(request.history), "or one before it holds a token that the model lacks"
            )
        wanted_format, vocabulary = request.response_format, self.vocabulary
        grammar = vocabulary.grammars.compile(wanted_format) if wanted_format else None
        # A default that cut an answer short would break its format.
        strings = () if grammar else (*(options.stop or ()), *(self._chat.stop if is_chat else ()))
        token_ids = frozenset(() if grammar else options.stop_token_ids or ())
        # A chat's answer begins a text, and what it goes on from is not shown with it.
        goes_on = not is_chat or grammar is not None
        return Prompt(
            ids=tuple(ids),
            sampling=SamplingParams.resolve(options),
            max_new_tokens=min(options.max_new_tokens or 1, window - len(ids)),
            context=vocabulary.detokenizer.context(ids, must=grammar is not None) if goes_on else (),
            stop=StopConditions(strings=strings, marks=vocabulary.stop_marks(strings), token_ids=token_ids),
            grammar=grammar,
            stage=self._first_stage(ids, grammar) if is_chat and vocabulary.marks.are_used else "text",
            is_chat=is_chat,
            tools=request.tools,
            cut_tokens=n_cut or None,
            n_choices=request.n,
            n_top_logprobs=min(request.top_logprobs or 0, self._n_vocab) if request.logprobs else None,
        )

    def _divide_window(self, request: GenerateRequest, options: GenerationOptions) -> tuple[int, int]:
        """Return how many tokens prompt and answer share, and how many of these the answer keeps."""
        window = min(self.context_window, options.context_window or self.context_window)
        if self._max_length and request.max_new_tokens is None:
            window = min(window, self._max_length)
        wanted = options.max_new_tokens or 1
        room = wanted if request.max_new_tokens else min(wanted, _MIN_ANSWER_TOKENS, window // 2)
        if room >= window:
            allowed = f"prompt and answer share {window} tokens of {self.name}"
            raise InvalidOptionError("max_new_tokens", str(wanted), allowed)
        return window, room

    def decoding(self, *, max_rows: int, budget_tokens: int | None = None) -> Decoding[Answer]:
        """Return an empty batch for `sequence`s.

        Args:
            max_rows: most answers that are computed at a time.
            budget_tokens: token slots that the caches may allocate; None derives them from the memory that is
                free.
        """
        if budget_tokens is None:
            devices = {weight.device for weight in self._model.parameters()}
            # Layers, and with them the cache, are spread evenly: the fullest GPU decides.
            share = min(map(free_bytes, devices)) * len(devices) // _MEMORY_SHARE
            budget_tokens = share // self._bytes_per_token if self._bytes_per_token else 1 << 62
        return Decoding(
            self.name, self._model, self.batch_mode, max_rows=max_rows, budget_tokens=budget_tokens
        )

    def sequence(
        self,
        prompt: Prompt,
        *,
        is_over: Callable[[], bool] = lambda: False,
        on_start: Callable[[], None] = lambda: None,
        on_piece: Callable[[str], None] | None = None,
    ) -> ScheduledSequence[Answer]:
        """Return a prompt's sequence, for a batch.

        Args:
            prompt: from `prepare`.
            is_over: asked between steps; once true, the sequence has left by the next one.
            on_start: called when its first forward pass begins.
            on_piece: called with each new piece of text: whole characters, no part of a stop string. All
                pieces together are the answer's text.
        """
        answering = Answering(self.vocabulary, prompt, self._forbidden, on_piece)
        return ScheduledSequence(
            answering.tokens, prompt.max_new_tokens, take=answering.take, is_over=is_over, on_start=on_start
        )

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer | PenstockError] | None]:
        """Answer prompts that are all there at once; closing the iterator gives the rest up.

        Yields:
            Index into `prompts` with its answer or its error, the moment it is known; None after each step.
        """
        decoding = self.decoding(max_rows=max(1, len(prompts)))
        places = {}
        for index, prompt in enumerate(prompts):
            decoding.add(sequence := self.sequence(prompt))
            places[sequence] = index
        while not decoding.is_idle:
            for sequence, outcome in decoding.step():
                yield places[sequence], outcome
            yield None

    def _first_stage(self, ids: Sequence[int], grammar: Grammar | None) -> Stage:
        marks = self.vocabulary.marks
        stage = marks.begin(ids)
        # Where a format holds from the first token on, only a mark that is one token can be let in beside it.
        return "text" if stage == "either" and grammar and marks.open_id is None else stage
