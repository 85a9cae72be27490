"""Conversations to answers at a server of OpenAI's kind: what is sent, and which answers may come back."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from penstock.errors import (
    IncompleteOutputError,
    InvalidFormatError,
    InvalidOptionError,
    UpstreamError,
)
from penstock.request import GenerateRequest, GenerationOptions
from penstock.result import FinishReason
from penstock.settings import ModelSettings
from penstock_workers.calling import Limits
from penstock_workers.engines.remote import Server, plain_word
from penstock_workers.upstream import Fault, Upstream

DEFAULTS: Final = GenerationOptions(max_new_tokens=256, truncation="error")


@dataclass(slots=True, kw_only=True)
class Turns:
    """One conversation to go on with.

    Attributes:
        fields: what is sent, but for the model's id.
        n_tokens: of the prompt; by estimate, then as the server counted.
        n_new_tokens: the most there may be, then those there are.
        has_format: the answer has to be JSON.
        cut_tokens: always 0; nothing is cut here.
        n_choices: always 1.
        n_likeliest: always None; no log-probabilities.
    """

    fields: Mapping[str, Any]
    n_tokens: int
    n_new_tokens: int
    has_format: bool
    cut_tokens: int = 0
    n_choices: int = 1
    n_likeliest: None = None

    def choices(self) -> list[Self]:
        """Return what is asked for each answer."""
        return [self]

    @property
    def cost_tokens(self) -> int:
        """Prompt and answer."""
        return self.n_tokens + self.n_new_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model said.

    Attributes:
        text: the new text alone.
        finish_reason: `stop` or `length`.
        n_tokens: new tokens, as the server counted.
        reasoning: what it thought before, where the server tells it apart.
        tool_calls: none: tools are refused.
        logprobs: none, likewise.
    """

    text: str
    finish_reason: FinishReason
    n_tokens: int
    reasoning: str | None = None
    tool_calls: None = None
    logprobs: None = None


class RemoteGenerator(Server):
    """A chat model at a server of OpenAI's kind.

    Attributes:
        context_window: prompt and answer together, tokens; None where the server does not say.
    """

    def __init__(self, name: str, model: ModelSettings, broker_url: str) -> None:
        super().__init__(name, model, broker_url)
        self.limits = Limits(1, math.inf)
        self.context_window: int | None = None
        self._defaults = model.generation.over(DEFAULTS)
        if self.provider and self.provider != "auto":
            self.model_id = f"{self.model_id}:{self.provider}"  # as the router names it

    async def find_out(self, upstream: Upstream) -> None:
        """Look whether it knows token and model, as far as it tells without an answer to pay for.

        See `Server.find_out`.
        """
        del upstream
        self.context_window = await self.find_model()

    def prepare(self, request: GenerateRequest) -> Turns:
        """Turn a request into what is sent.

        Raises:
            InvalidOptionError: it cannot be done without the model's tokenizer.
            InvalidFormatError: not one of OpenAI's formats.
        """
        options = request.options().over(self._defaults)
        if options.truncation in ("oldest_turns", "middle") or options.context_window is not None:
            name = "context_window" if options.context_window is not None else "truncation"
            raise InvalidOptionError(name, "set", "a remote model's tokens cannot be counted here")
        has_calls = any(turn.tool_calls or turn.role == "tool" for turn in request.history)
        foreign = {
            "mode": request.mode == "complete",
            "tools": request.tools or has_calls,
            "n": request.n > 1,
            "logprobs": request.logprobs,
        }
        for name in (name for name, is_set in foreign.items() if is_set):
            raise InvalidOptionError(name, "set", "remote models are asked for one plain answer to turns")
        wanted = request.response_format
        if wanted and wanted["type"] in ("regex", "choice"):
            raise InvalidFormatError(
                f"{wanted['type']} is none of OpenAI's formats, which remote models have"
            )
        has_format = wanted is not None and wanted["type"] != "text"
        stop = [] if has_format else [*(options.stop or ())]
        known = {
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "presence_penalty": options.presence_penalty,
            "seed": options.seed,
            "stop": stop or None,
            "response_format": _openai_format(request) if has_format else None,
        }
        extra = {
            "top_k": options.top_k,
            "min_p": options.min_p,
            "repetition_penalty": options.repetition_penalty,
            "stop_token_ids": None if has_format else options.stop_token_ids,
            "chat_template_kwargs": _thinking(options),
        }
        fields: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
        fields["messages"] = [{"role": turn.role, "content": turn.content} for turn in request.messages()]
        if extra := {name: value for name, value in extra.items() if value is not None}:
            fields["extra_body"] = extra  # not OpenAI's: vLLM and others take them
        return Turns(
            fields=fields,
            n_tokens=sum(self.estimate(turn.content) + 4 for turn in request.messages()),
            n_new_tokens=options.max_new_tokens or 1,
            has_format=has_format,
        )

    async def call(
        self, items: Sequence[Turns], on_piece: Callable[[str], None] | None
    ) -> list[Answer | UpstreamError]:
        """Answer one conversation, piece by piece if somebody listens.

        Raises:
            Fault: there is no answer; `broken` if a part of it was passed on.
        """
        (turns,) = items
        heard: list[str] = []

        def pass_on(piece: str) -> None:
            assert on_piece is not None
            heard.append(piece)
            on_piece(piece)

        try:
            answer = await (self._ask(turns) if on_piece is None else self._stream(turns, pass_on))
        except Exception as error:
            fault = self.explain(error)
            if heard and fault.kind in ("busy", "failed"):
                problem = getattr(fault.error, "problem", str(fault.error))
                after = f"it ended after {sum(map(len, heard))} characters: {problem}"
                raise Fault("broken", self.bad_answer(after)) from error
            raise fault from error
        if turns.has_format and not _is_json(answer.text):
            problem = self.bad_answer("it does not follow response_format")
            if heard:
                raise Fault("refused", problem)
            return [problem]
        return [answer]

    async def _ask(self, turns: Turns) -> Answer:
        reply = await self.api.chat.completions.with_raw_response.create(model=self.model_id, **turns.fields)
        body = json.loads(reply.http_response.content)
        if not isinstance(body, dict) or not body.get("choices"):
            raise self.bad_answer(f"it is no answer{self.code(body)}")
        choice = body["choices"][0]
        said = choice["message"]
        thought = said.get("reasoning_content") or said.get("reasoning")
        return self._answer(turns, said["content"], choice["finish_reason"], body.get("usage"), thought)

    async def _stream(self, turns: Turns, pass_on: Callable[[str], None]) -> Answer:
        text, reason, usage = [], None, None
        stream = await self.api.chat.completions.create(
            model=self.model_id, stream=True, stream_options={"include_usage": True}, **turns.fields
        )
        async with stream:
            async for chunk in stream:
                usage = chunk.usage.model_dump() if chunk.usage else usage
                for choice in chunk.choices or ():
                    if choice.delta and choice.delta.content:
                        text.append(choice.delta.content)
                        pass_on(choice.delta.content)
                    reason = choice.finish_reason or reason
        if reason is None:
            raise self.bad_answer("the stream ended before the answer did")
        return self._answer(turns, "".join(text), reason, usage)

    def _answer(
        self, turns: Turns, text: object, reason: object, usage: object, thought: object = None
    ) -> Answer:
        if not isinstance(text, str):
            raise self.bad_answer("it holds no text")
        counted = usage if isinstance(usage, dict) else {}
        n_bytes = sum(len(turn["content"].encode()) for turn in turns.fields["messages"])
        turns.n_tokens = self.counted(n_bytes, counted.get("prompt_tokens")) or turns.n_tokens
        n_new = counted.get("completion_tokens")
        turns.n_new_tokens = n_new if isinstance(n_new, int) else self.estimate(text)
        ended = _FINISH.get(str(reason))
        if ended is None:
            raise self.refused(200, f"the answer was ended by {plain_word(reason) or 'something unknown'}")
        if turns.has_format and ended == "length":
            raise IncompleteOutputError(turns.n_new_tokens, text)
        return Answer(
            text=text,
            finish_reason=ended,
            n_tokens=turns.n_new_tokens,
            reasoning=thought if isinstance(thought, str) else None,
        )


_FINISH: Final[dict[str, FinishReason]] = {
    "stop": "stop",
    "eos_token": "stop",  # TGI's word
    "stop_sequence": "stop",
    "length": "length",
}


def _thinking(options: GenerationOptions) -> dict[str, bool] | None:
    return None if options.enable_thinking is None else {"enable_thinking": options.enable_thinking}


def _openai_format(request: GenerateRequest) -> dict[str, Any]:
    wanted: dict[str, Any] = json.loads(json.dumps(request.response_format))
    if wanted["type"] == "json_schema":
        wanted["json_schema"] = {"name": "answer", "strict": True} | wanted["json_schema"]
    return wanted


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
