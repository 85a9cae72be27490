"""Text from a causal language model: what a request becomes, and the loop that answers many at a time."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from penstock.errors import (
    EngineError,
    InputTooLongError,
    InvalidOptionError,
    InvalidTextError,
    ModelLoadError,
    OutOfMemoryError,
)
from penstock.request import GenerateRequest, GenerationOptions, Message
from penstock.result import FinishReason
from penstock.settings import ModelSettings
from penstock_workers.engines.causal_lm import Batch, context_window, load_causal_lm
from penstock_workers.engines.chat import Chat
from penstock_workers.engines.sampling import Sampling, draw, own_options, penalize
from penstock_workers.engines.source import explain_failure, resolve_source

_DEFAULTS = GenerationOptions(max_new_tokens=256, stop=(), truncation="error")
_LEAST_ROOM_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request, ready for the model.

    Attributes:
        ids: tokens of the whole conversation, the start of the answer included.
        sampling: how tokens are drawn.
        max_new_tokens: fits into the context window together with `ids`.
        stop: strings that end the answer.
    """

    ids: tuple[int, ...]
    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...]

    @property
    def n_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said.

    Attributes:
        text: the new text alone, cut before a stop string; special tokens left out.
        finish_reason: `stop` if the model or a stop string ended it, `length` if the limit did.
        n_tokens: new tokens, those of a stop string counted, the end-of-sequence token not.
    """

    text: str
    finish_reason: FinishReason
    n_tokens: int


class Generator:
    """A causal language model with its tokenizer.

    Attributes:
        name: the name it is served under.
        context_window: prompt and answer together, tokens.
        dtype: number format of the weights.
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
        self._model, self._tokenizer, self._chat = model, tokenizer, Chat(tokenizer)
        self._defaults = options.over(own_options(model.generation_config)).over(_DEFAULTS)
        self._n_vocab = model.config.get_text_config(decoder=True).vocab_size
        self._end_ids = _end_ids(model, tokenizer)
        self._hidden_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}

    @classmethod
    def load(cls, name: str, model: ModelSettings, device: torch.device) -> Self:
        """Load the model that `model.source` names.

        Raises:
            ModelLoadError: the files are missing, damaged or no causal language model, or the model
                cannot answer several requests at a time.
        """
        source = resolve_source(name, model)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # has no annotations
        try:
            generator = cls(name, *load_causal_lm(name, source, model, device), model.generation)
            generator._try_out()
        except ModelLoadError:
            raise
        except Exception as error:
            raise explain_failure(name, error) from error
        return generator

    def prepare(self, request: GenerateRequest) -> Prompt:
        """Turn a request into tokens; safe to call from many threads.

        A `max_new_tokens` that the call set keeps its room in the context window. A default one
        shrinks to what the prompt leaves, though never below 64 tokens (or half a tiny window).

        Raises:
            InputTooLongError: the prompt leaves no room for the answer, after dropping the turns
                that `truncation` allows to drop.
            RequestError: an option or the order of turns does not suit this model.
        """
        options = request.options().over(self._defaults)
        window = min(self.context_window, options.context_window or self.context_window)
        wanted = options.max_new_tokens or 1
        room = wanted if request.max_new_tokens else min(wanted, _LEAST_ROOM_TOKENS, window // 2)
        if room >= window:
            allowed = f"prompt and answer share {window} tokens of {self.name}"
            raise InvalidOptionError("max_new_tokens", str(wanted), allowed)
        ids = self._fit(request.messages(), window - room, options)
        if max(ids) >= self._n_vocab:  # would end the whole batch: some tokenizers know more than their model
            raise InvalidTextError(
                len(request.history), "or one before it holds a token that the model lacks"
            )
        return Prompt(
            ids=tuple(ids),
            sampling=Sampling.resolve(options),
            max_new_tokens=min(wanted, window - len(ids)),
            stop=(*(options.stop or ()), *self._chat.stop),
        )

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer | EngineError] | None]:
        """Answer all prompts together, one token each per step; for one thread only.

        Whoever is finished leaves the batch: nobody waits for the longest answer. Closing the
        iterator gives the others up.

        Yields:
            Index into `prompts` with its answer or its error, the moment it is known; None after each
            step, as a sign of life.

        Raises:
            OutOfMemoryError: the batch did not fit; what was not yielded can be tried in smaller ones.
            EngineError: the model failed, for all that was not yielded.
        """
        rows = [_Row(index=index, prompt=prompt) for index, prompt in enumerate(prompts)]
        batch = Batch(self._model, [prompt.ids for prompt in prompts]) if rows else None
        while batch is not None:
            logits = self._step(batch, rows)
            yield None
            kept, tokens = [], []
            for place, token in enumerate(_choose(logits, rows)):
                outcome = self._settle(rows[place], token)
                if outcome is not None:
                    yield rows[place].index, outcome
                elif token is not None:
                    kept.append(place)
                    tokens.append(token)
            if not kept:
                return
            if len(kept) < len(rows):
                batch.keep(kept)
                rows = [rows[place] for place in kept]
            batch.append(tokens)

    def _fit(self, turns: list[Message], limit: int, options: GenerationOptions) -> list[int]:
        """Return at most `limit` tokens, dropping the oldest turns if that is allowed and needed."""
        ids = self._chat.encode(turns)
        if len(ids) > limit and options.truncation == "oldest_turns":
            ids = self._drop_oldest(turns, limit) or ids
        if len(ids) > limit:
            raise InputTooLongError(self.name, len(ids), limit)
        return ids

    def _drop_oldest(self, turns: list[Message], limit: int) -> list[int]:
        """Return the tokens of the longest end of the conversation that fits, else of the shortest."""
        n_head = next(i for i, turn in enumerate(turns) if turn.role != "system")
        # An answer goes with its question: what is kept begins with a turn of the user.
        starts = [i for i in range(n_head + 1, len(turns)) if turns[i].role == "user"]

        def ids_from(start: int) -> list[int]:
            return self._chat.encode([*turns[:n_head], *turns[start:]])

        best = bisect.bisect_left(starts, True, key=lambda start: len(ids_from(start)) <= limit)
        return ids_from(starts[min(best, len(starts) - 1)]) if starts else []

    def _step(self, batch: Batch, rows: "list[_Row]") -> Tensor:
        """Run the model once; float32 on the CPU, shape (n_rows, vocab)."""
        try:
            return batch.forward()
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                longest = max(row.prompt.n_tokens + row.n_tokens for row in rows)
                raise OutOfMemoryError(self.name, longest) from error
            raise EngineError(self.name, f"{type(error).__name__} in the forward pass") from error

    def _settle(self, row: "_Row", token: int | None) -> Answer | EngineError | None:
        """Note the row's new token; return how the row ended, if it did."""
        if token is None:
            return EngineError(self.name, "logits are not finite")
        if token in self._end_ids:
            return self._answer(row, self._decode(row.shown), "stop")
        row.tokens.append(token)
        if token not in self._hidden_ids:
            row.shown.append(token)
        if (text := self._text_before_stop(row)) is not None:
            return self._answer(row, text, "stop")
        if row.n_tokens == row.prompt.max_new_tokens:
            # The limit may fall inside a character, which then decodes to replacement characters.
            return self._answer(row, self._decode(row.shown).rstrip("\ufffd"), "length")
        return None

    def _text_before_stop(self, row: "_Row") -> str | None:
        """Return the answer up to its first stop string, None if there is none."""
        stop = row.prompt.stop
        if not stop or not _contains(self._decode(row.shown[-row.n_tail :]), stop):
            return None
        text = self._decode(row.shown)
        ends = [end for string in stop if (end := text.find(string)) >= 0]
        return text[: min(ends)] if ends else None

    def _decode(self, ids: list[int]) -> str:
        # Cleaning up spaces would change text, such as " ." in code.
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @staticmethod
    def _answer(row: "_Row", text: str, finish_reason: FinishReason) -> Answer:
        return Answer(text=text, finish_reason=finish_reason, n_tokens=row.n_tokens)

    @torch.inference_mode()
    def _try_out(self) -> None:
        """Check that a row's logits do not depend on its neighbours, nor on being computed token by token.

        Which models can share a batch cannot be read off their class: position ids may be ignored,
        or there may be no cache of keys and values.
        """
        batch = Batch(self._model, [[3, 1, 2], [2, 3, 1, 1, 3, 2, 2, 1, 3], [1]])
        batch.forward()
        batch.append([1, 2, 3])
        batch.forward()
        batch.keep([0])
        batch.append([2])
        shared = batch.forward()[0]
        ids = torch.tensor([[3, 1, 2, 1, 2]], device=self._model.device)
        alone = self._model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
        # Far above what rounding in bfloat16 does, far below what a wrong position does.
        if not (shared - alone).abs().max() <= 0.3 * alone.std():
            raise ModelLoadError(self.name, "its logits in a batch differ from those of a text alone")


@dataclass(slots=True, kw_only=True, eq=False)
class _Row:
    """A request on its way through the batch."""

    index: int
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)  # tokens that are text
    seen: Tensor | None = None  # where a penalty needs it; bool, shape (vocab,)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_tail(self) -> int:
        """How many of the last tokens hold any stop string that the newest one completes."""
        # A shown token is a byte at least; a few more, since some decoders strip what a text begins with.
        return max(len(string.encode()) for string in self.prompt.stop) + 4

    def penalized(self, logits: Tensor) -> Tensor:
        """Return logits with the repetition penalty; float32, shape (vocab,)."""
        if self.seen is None:
            self.seen = torch.zeros(len(logits), dtype=torch.bool)
            self.seen[list(self.prompt.ids)] = True
        self.seen[self.tokens[-1:]] = True
        return penalize(logits, self.seen, self.prompt.sampling.repetition_penalty)


@torch.inference_mode()  # logits are written to, which torch allows nowhere else
def _choose(logits: Tensor, rows: Sequence[_Row]) -> list[int | None]:
    """Choose each row's next token; None where the logits are not finite. Logits: (n_rows, vocab)."""
    for place, row in enumerate(rows):
        if row.prompt.sampling.repetition_penalty != 1:
            logits[place] = row.penalized(logits[place])
    # Single tokens may be forbidden with -inf; NaN anywhere is the largest.
    largest, likeliest = logits.max(dim=-1)
    chosen: list[int | None] = []
    for place, row in enumerate(rows):
        if not torch.isfinite(largest[place]):
            chosen.append(None)
        elif row.prompt.sampling.temperature > 0:
            chosen.append(draw(logits[place], row.prompt.sampling, row.n_tokens))
        else:
            chosen.append(int(likeliest[place]))
    return chosen


def _contains(text: str, strings: Sequence[str]) -> bool:
    return any(string in text for string in strings)


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end an answer: chat models often name one more than their tokenizer."""
    own = model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [own]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)
