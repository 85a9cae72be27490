"""Conversations to answers at a server of OpenAI's kind: what is sent, and what comes back."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from penstock.conversation import ToolCall
from penstock.errors import IncompleteOutputError, InvalidFormatError, InvalidOptionError, UpstreamError
from penstock.request import GenerateRequest, GenerationOptions
from penstock_workers.batching.feed import Answer, Thought
from penstock_workers.remote.answer import (
    FINISH,
    UnusableError,
    join,
    read_choice,
    thought_of,
    whole_text,
)
from penstock_workers.remote.backlog import Limits
from penstock_workers.remote.client_errors import plain_word
from penstock_workers.remote.faults import Fault
from penstock_workers.remote.server import Server
from penstock_workers.remote.token_estimates import share_out
from penstock_workers.remote.upstream import Upstream
from penstock_workers.settings import ModelSettings

DEFAULTS: Final = GenerationOptions(max_new_tokens=256, truncation="error")
_TURN_TOKENS: Final = 4  # around what is said in a turn


@dataclass(slots=True, kw_only=True)
class Prompt:
    """One conversation to answer, or text to go on with.

    Attributes:
        fields: Body of the request, without the model's id; a conversation has `messages`, a text `prompt`.
        n_bytes: Bytes of all that the model reads, in UTF-8.
        n_tokens: Tokens of the same; estimated, then as the server counted.
        max_new_tokens: Most tokens of one answer.
        n_new_tokens: Most tokens of all answers together; then their actual number.
        has_format: True if the answer has to be JSON.
        n_choices: Number of answers that are wanted.
        n_top_logprobs: Number of tokens whose log-probabilities are wanted beside the chosen one's; None for
            no log-probabilities.
        cut_tokens: See `Usage`; nothing is cut here.
    """

    fields: Mapping[str, Any]
    n_bytes: int
    n_tokens: int
    max_new_tokens: int
    n_new_tokens: int
    has_format: bool
    n_choices: int = 1
    n_top_logprobs: int | None = None
    cut_tokens: None = None

    def choices(self) -> list[Self]:
        """Return what is asked for: all answers come in one."""
        return [self]

    def answers(self, found: Sequence[list[Answer]]) -> list[Answer]:
        """Return as many answers as are wanted of those to `choices`."""
        (answers,) = found
        return answers * (self.n_choices // len(answers))

    @property
    def cost_tokens(self) -> int:
        """Prompt and answers."""
        return self.n_tokens + self.n_new_tokens


class RemoteGenerator(Server):
    """A chat model at a server of OpenAI's kind.

    Attributes:
        context_window: Most tokens of prompt and answer together; None if the server does not say.
    """

    def __init__(self, name: str, model: ModelSettings, broker_url: str) -> None:
        super().__init__(name, model, broker_url)
        self.limits = Limits(1, math.inf)
        self.context_window: int | None = None
        self._defaults = model.generation.over(DEFAULTS)
        if self.endpoint.provider and self.endpoint.provider != "auto":
            self.model_id = f"{self.model_id}:{self.endpoint.provider}"  # as the router names it

    async def find_out(self, upstream: Upstream) -> None:
        """Look whether it knows token and model, as far as it tells without an answer to pay for.

        See `Server.find_out`.
        """
        del upstream
        self.context_window = await self.find_model()

    def prepare(self, request: GenerateRequest) -> Prompt:
        """Turn a request into what is sent.

        Raises:
            InvalidOptionError: OpenAI's protocol has no such thing, or it takes the model's tokenizer.
            InvalidFormatError: not one of OpenAI's formats.
        """
        options = request.options().over(self._defaults)
        if options.truncation in ("oldest_turns", "middle") or options.context_window is not None:
            name = "context_window" if options.context_window is not None else "truncation"
            raise InvalidOptionError(name, "set", "a remote model's tokens cannot be counted here")
        wanted = request.response_format
        if wanted and wanted["type"] in ("regex", "choice"):
            raise InvalidFormatError(
                f"{wanted['type']} is none of OpenAI's formats, which remote models have"
            )
        has_format = wanted is not None and wanted["type"] != "text"
        if has_format and request.mode == "complete":
            raise InvalidOptionError("response_format", "set", "a remote model has none in mode 'complete'")
        fields, texts = _fields(request, options, has_format=has_format), _texts(request)
        max_new_tokens = options.max_new_tokens or 1
        return Prompt(
            fields=fields,
            n_bytes=sum(len(text.encode()) for text in texts),
            n_tokens=sum(self.tokens.estimate(text) + _TURN_TOKENS for text in texts),
            max_new_tokens=max_new_tokens,
            n_new_tokens=fields.get("n", 1) * max_new_tokens,
            has_format=has_format,
            n_choices=request.n,
            n_top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )

    async def call(
        self, items: Sequence[Prompt], on_piece: Callable[[str], None] | None
    ) -> list[list[Answer] | UpstreamError]:
        """Answer one prompt, piece by piece if somebody listens.

        Raises:
            Fault: there is no answer; `broken` if a part of it was passed on.
        """
        (prompt,) = items
        heard: list[str] = []

        def pass_on(piece: str) -> None:
            assert on_piece is not None
            heard.append(piece)
            on_piece(piece)

        try:
            body = await (self._ask(prompt) if on_piece is None else self._stream(prompt, pass_on))
            return [self._read(prompt, body)]
        except UnusableError as error:
            problem = self.errors.bad_answer(str(error))
            if heard:
                raise Fault("refused", problem) from error
            return [problem]
        except Exception as error:
            fault = self.errors.explain(error)
            if heard and fault.kind in ("busy", "failed"):
                problem_of = getattr(fault.error, "problem", str(fault.error))
                after = f"it ended after {sum(map(len, heard))} characters: {problem_of}"
                raise Fault("broken", self.errors.bad_answer(after)) from error
            raise fault from error

    def _completions(self, prompt: Prompt) -> Any:  # two classes with the same methods
        return self.api.chat.completions if "messages" in prompt.fields else self.api.completions

    async def _ask(self, prompt: Prompt) -> dict[str, Any]:
        api = self._completions(prompt).with_raw_response
        reply = await api.create(model=self.model_id, **prompt.fields)
        body = json.loads(reply.http_response.content)
        if not isinstance(body, dict) or not body.get("choices"):
            raise self.errors.bad_answer(f"it is no answer{self.errors.code(body)}")
        return body

    async def _stream(self, prompt: Prompt, pass_on: Callable[[str], None]) -> dict[str, Any]:
        choice: dict[str, Any] = {"delta": {"content": ""}}
        usage = None
        stream = await self._completions(prompt).create(
            model=self.model_id, stream=True, stream_options={"include_usage": True}, **prompt.fields
        )
        async with stream:
            async for chunk in stream:
                event = chunk.model_dump(warnings=False)
                usage = event.get("usage") or usage
                for piece in event.get("choices") or ():
                    delta = piece.get("delta") or {}
                    if thought := thought_of(delta):
                        pass_on(Thought(thought))
                    if text := delta.get("content") or piece.get("text"):
                        pass_on(text)
                    join(choice, piece)
        if "finish_reason" not in choice:
            raise self.errors.bad_answer("the stream ended before the answer did")
        return {"choices": [choice], "usage": usage}

    def _read(self, prompt: Prompt, body: Mapping[str, Any]) -> list[Answer]:
        """Return a body's answers, and note what the server counted.

        Raises:
            UnusableError: another number of them, or one that lacks what was asked for.
            UpstreamRefusedError: the server ended one for its own reasons.
            IncompleteOutputError: one was cut short of its format.
        """
        choices = sorted(body["choices"], key=lambda choice: choice.get("index") or 0)
        if len(choices) != (n := prompt.fields.get("n", 1)):
            raise UnusableError(f"{len(choices)} answers, not {n}")
        for choice in choices:
            if (reason := choice["finish_reason"]) not in FINISH:
                raise self.errors.refused(
                    200, f"the answer was ended by {plain_word(reason) or 'something unknown'}"
                )
        usage = body.get("usage")
        counted = usage if isinstance(usage, dict) else {}
        prompt.n_tokens = self.tokens.counted(prompt.n_bytes, counted.get("prompt_tokens")) or prompt.n_tokens
        answers = [
            read_choice(choice, has_tools="tools" in prompt.fields, n_top_logprobs=prompt.n_top_logprobs)
            for choice in choices
        ]
        n_tokens = [
            len(answer.logprobs or ()) or self.tokens.estimate(whole_text(answer)) for answer in answers
        ]
        if isinstance(n_new := counted.get("completion_tokens"), int):
            n_tokens = share_out(n_new, n_tokens)
        prompt.n_new_tokens = sum(n_tokens)
        answers = [replace(answer, n_tokens=n) for answer, n in zip(answers, n_tokens, strict=True)]
        for answer in answers if prompt.has_format else ():
            _check_format(answer)
        return answers


def _fields(request: GenerateRequest, options: GenerationOptions, *, has_format: bool) -> dict[str, Any]:
    """Return a request under OpenAI's names."""
    fields: dict[str, Any] = {
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "presence_penalty": options.presence_penalty,
        "seed": options.seed,
        # A default that cut an answer short would break its format.
        "stop": None if has_format else [*(options.stop or ())] or None,
        # Greedy ones would be equal, and vLLM refuses them.
        "n": request.n if request.n > 1 and options.temperature != 0 else None,
    }
    extra: dict[str, Any] = {  # not OpenAI's: vLLM and others take them
        "top_k": options.top_k,
        "min_p": options.min_p,
        "repetition_penalty": options.repetition_penalty,
        "stop_token_ids": None if has_format else options.stop_token_ids,
    }
    if request.mode == "complete":
        fields["prompt"] = request.prompt
        fields["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
    else:
        fields["messages"] = _messages(request)
        fields["tools"] = request.tools
        fields["response_format"] = _openai_format(request) if has_format else None
        fields["logprobs"] = request.logprobs or None
        fields["top_logprobs"] = request.top_logprobs
        if options.enable_thinking is not None:
            extra["chat_template_kwargs"] = {"enable_thinking": options.enable_thinking}
    fields["extra_body"] = {name: value for name, value in extra.items() if value is not None} or None
    return {name: value for name, value in fields.items() if value is not None}


def _check_format(answer: Answer) -> None:
    if answer.finish_reason == "length":
        raise IncompleteOutputError(answer.n_tokens, answer.text)
    if not answer.tool_calls and not _is_json(answer.text):
        raise UnusableError("it does not follow response_format")


def _messages(request: GenerateRequest) -> list[dict[str, Any]]:
    """Return a conversation in OpenAI's form, where each call has an id and each tool's turn names one."""
    messages: list[dict[str, Any]] = []
    unanswered: dict[str, str] = {}
    for place, turn in enumerate(request.messages()):
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.role == "tool":
            call_id = turn.tool_call_id or next(
                (i for i, name in unanswered.items() if turn.name in (name, None)), None
            )
            if call_id is None:
                raise InvalidOptionError("history", "of tools", "an answer names its call with tool_call_id")
            unanswered.pop(call_id, None)
            message["tool_call_id"] = call_id
        elif turn.tool_calls:
            # Nine letters and digits: Mistral's templates take nothing else.
            calls = [_call(call, f"c{place:05}{i:03}") for i, call in enumerate(turn.tool_calls)]
            unanswered = {call["id"]: call["function"]["name"] for call in calls}
            message |= {"content": turn.content or None, "tool_calls": calls}
        messages.append(message)
    return messages


def _call(call: ToolCall, own_id: str) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    named = {"name": function["name"], "arguments": arguments}
    return {"id": call.get("id") or own_id, "type": "function", "function": named}


def _texts(request: GenerateRequest) -> list[str]:
    """Return all that the model reads."""
    turns = request.messages()
    called = [json.dumps(turn.tool_calls, ensure_ascii=False) for turn in turns if turn.tool_calls]
    tools = [json.dumps(request.tools, ensure_ascii=False)] if request.tools else []
    return [*(turn.content for turn in turns), *called, *tools]


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
