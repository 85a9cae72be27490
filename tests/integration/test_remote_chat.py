"""Remote chat models: what a request becomes in OpenAI's protocol, and what comes back of it."""

import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest

from penstock.conversation import Message
from penstock.errors import (
    IncompleteOutputError,
    InvalidFormatError,
    InvalidOptionError,
    ModelLoadError,
    UpstreamAnswerError,
    UpstreamRefusedError,
)
from penstock.request import GenerateRequest, new_job_id
from penstock_workers.batching.feed import Answer, Job, Thought
from penstock_workers.remote import dispatcher
from penstock_workers.remote.chat import Prompt, RemoteGenerator
from penstock_workers.remote.dispatcher import Dispatcher
from penstock_workers.settings import ModelSettings
from tests.deployment import Server
from tests.upstream import (
    ANSWER,
    ARGUMENTS,
    TOOLS,
    Act,
    Upstream,
    answers,
    chat,
    dies_after,
    logprob_of,
    remote_settings,
    says,
)


class Generation:
    """A remote chat model as a worker has it."""

    def __init__(self, server: Server, model: ModelSettings) -> None:
        self.engine = RemoteGenerator.load("hosted", model, server.broker_url)
        self.dispatcher: Dispatcher = Dispatcher(self.engine)

    def ask(self, listen: Callable[[str], None] | None = None, **options: object) -> Answer:
        """Return the only answer to a request."""
        (answer,) = self.ask_all(listen, **options)
        return answer

    def ask_all(self, listen: Callable[[str], None] | None = None, **options: object) -> list[Answer]:
        """Return the answers to a request."""
        request = GenerateRequest.parse({"model": "hosted", "prompt": "Who?", **options})
        self.prompt: Prompt = self.engine.prepare(request)
        work = self.dispatcher.submit(
            Job(id=new_job_id(), deadline=time.time() + 20),
            self.prompt.choices(),
            listen=None if listen is None else lambda _, piece: listen(piece),
        )
        return self.prompt.answers(work.wait())


Make = Callable[..., Generation]


@pytest.fixture
def generation(server: Server, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Connect to the server; it is asked again as often, but sooner."""
    monkeypatch.setattr(dispatcher, "BACKOFF_S", (0.05, 1.0))
    return lambda **remote: Generation(server, remote_settings(f"{upstream.url}/v1", "generate", **remote))


def test_an_answer_comes_whole_or_in_pieces(generation: Make, upstream: Upstream) -> None:
    """Options arrive under OpenAI's names; tokens are those that the server counted."""
    hosted = generation()
    pieces: list[str] = []

    whole = hosted.ask(max_new_tokens=7, stop=["!"], top_k=5, system_prompt="Be brief.", seed=3)
    streamed = hosted.ask(pieces.append)

    assert whole == streamed == Answer(text="".join(ANSWER), finish_reason="stop", n_tokens=4)
    assert pieces == ANSWER
    assert hosted.prompt.n_tokens == 11
    sent = upstream.seen[0].body
    assert {name: sent[name] for name in ("max_tokens", "stop", "top_k", "seed")} == {
        "max_tokens": 7,
        "stop": ["!"],
        "top_k": 5,
        "seed": 3,
    }
    assert [turn["role"] for turn in sent["messages"]] == ["system", "user"]


def test_a_stream_that_dies_is_not_begun_again(generation: Make, upstream: Upstream) -> None:
    """Before its first piece it is asked again; after it, the reader hears that it is broken."""
    hosted = generation()
    upstream.plan.append(dies_after(0))
    pieces: list[str] = []
    assert hosted.ask(pieces.append).text == "".join(ANSWER)

    upstream.plan.append(dies_after(2))
    with pytest.raises(UpstreamAnswerError, match="ended after 10 characters"):
        hosted.ask(pieces.append)
    assert pieces == [*ANSWER, *ANSWER[:2]]
    assert len(upstream.seen) == 3


def test_formats_are_openai_s(generation: Make, upstream: Upstream) -> None:
    """A schema is passed on; what does not follow it, or is cut, is no answer."""
    hosted = generation()
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    upstream.plan.append(lambda handler, _: handler.reply(200, chat(['{"a": ', "1}"])))
    assert hosted.ask(response_format=schema).text == '{"a": 1}'
    assert upstream.seen[0].body["response_format"]["json_schema"]["schema"] == {"type": "object"}

    with pytest.raises(UpstreamAnswerError, match="does not follow"):
        hosted.ask(response_format={"type": "json_object"})
    upstream.plan.append(lambda handler, _: handler.reply(200, chat(['{"a'], "length")))
    with pytest.raises(IncompleteOutputError):
        hosted.ask(response_format=schema)
    with pytest.raises(InvalidFormatError, match="regex"):
        hosted.ask(response_format={"type": "regex", "pattern": "a"})
    with pytest.raises(InvalidOptionError, match="mode 'complete'"):
        hosted.ask(mode="complete", response_format=schema)


def test_the_only_model_need_not_be_named(server: Server, upstream: Upstream) -> None:
    """What the server lists is asked for; of several, one has to be named."""
    upstream.models = [{"id": "only", "max_model_len": 4096}]
    hosted = Generation(server, remote_settings(f"{upstream.url}/v1", "generate", model=None))
    hosted.ask()

    assert upstream.seen[0].body["model"] == "only"
    assert hosted.engine.context_window == 4096
    upstream.models.append({"id": "other"})
    with pytest.raises(ModelLoadError, match="only, other"):
        Generation(server, remote_settings(f"{upstream.url}/v1", "generate", model=None))


CALLS = [
    {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ARGUMENTS}}
    for index, name in enumerate(("weather", "time"))
]


def test_calls_come_back_whole_and_in_streams(generation: Make, upstream: Upstream) -> None:
    """Pieces of calls are joined, each to its own; the calls and their answers go back as history."""
    hosted = generation()
    pieces: list[str] = []

    whole = hosted.ask(tools=TOOLS)
    streamed = hosted.ask(pieces.append, tools=TOOLS)
    said = {"role": "assistant", "tool_calls": whole.tool_calls}
    turns = [{"role": "tool", "content": "Rain.", "tool_call_id": f"call_{i}"} for i in (1, 0)]
    last = hosted.ask(tools=TOOLS, prompt=None, history=[{"role": "user", "content": "Rain?"}, said, *turns])

    assert whole.tool_calls == streamed.tool_calls == CALLS
    assert (whole.text, whole.finish_reason, pieces) == ("", "stop", ANSWER)
    assert upstream.seen[0].body["tools"] == TOOLS
    assert upstream.seen[2].body["messages"][1:] == [
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        *turns,
    ]
    assert (last.text, last.tool_calls) == ("".join(ANSWER), None)


def test_calls_without_ids_get_some(generation: Make, upstream: Upstream) -> None:
    """OpenAI's protocol wants one in each call and each answer; these go to their calls by name, in order."""
    calls = [
        {"function": {"name": name, "arguments": arguments}}
        for name, arguments in (("weather", {"city": "Paris"}), ("time", "{}"), ("weather", "{}"))
    ]
    answered = [{"role": "tool", "content": "?", "name": name} for name in ("time", "weather", "weather")]
    history = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "tool_calls": calls}, *answered]
    hosted = generation()
    hosted.ask(prompt=None, history=history)

    _, said, *turns = upstream.seen[0].body["messages"]
    ids = [call["id"] for call in said["tool_calls"]]
    assert len(set(ids)) == 3
    assert [turn["tool_call_id"] for turn in turns] == [ids[1], ids[0], ids[2]]
    assert said["tool_calls"][0]["function"]["arguments"] == ARGUMENTS
    with pytest.raises(InvalidOptionError, match="tool_call_id"):
        hosted.ask(prompt=None, history=[*history, answered[0]])


def test_several_answers_are_asked_for_at_once(generation: Make, upstream: Upstream) -> None:
    """They come in their order and share what the server counted; greedy ones are asked for once."""
    hosted = generation()
    found = hosted.ask_all(n=3, seed=1)
    equal = hosted.ask_all(n=3, temperature=0.0)

    assert [answer.text for answer in found] == ["".join(ANSWER) + "!" * i for i in range(3)]
    assert sum(answer.n_tokens for answer in found) == hosted.prompt.n_new_tokens == 4
    assert [answer.text for answer in equal] == ["".join(ANSWER)] * 3
    assert [seen.body.get("n") for seen in upstream.seen] == [3, None]


@pytest.mark.parametrize("mode", ["chat", "complete"])
@pytest.mark.parametrize("streams", [False, True])
def test_log_probabilities_have_our_form(generation: Make, mode: str, streams: bool) -> None:
    """Either shape gives tokens with their bytes, the likeliest first, whole or joined from pieces."""
    heard: list[str] = []
    answer = generation().ask(heard.append if streams else None, mode=mode, logprobs=True, top_logprobs=3)

    found = answer.logprobs
    assert found is not None
    assert found.ids.shape == found.values.shape == (len(ANSWER), 4)
    assert [token.token for token in found] == ANSWER
    assert [token.logprob for token in found] == [logprob_of(piece) for piece in ANSWER]
    assert [[t.token for t in token.top] for token in found] == [[p, p + "~", p + "~~"] for p in ANSWER]
    assert b"".join(token.bytes for token in found).decode() == answer.text


def test_log_probabilities_of_the_chosen_alone(generation: Make) -> None:
    """Without `top_logprobs` there are no others."""
    for mode in ("chat", "complete"):
        found = generation().ask(mode=mode, logprobs=True).logprobs
        assert found is not None
        assert [token.top for token in found] == [()] * len(ANSWER)


def test_half_characters_and_short_lists_are_kept(generation: Make, upstream: Upstream) -> None:
    """Tokens are bytes, with -1 where the server told fewer of the likeliest."""

    def split(answer: dict[str, Any]) -> None:
        (choice,) = answer["choices"]
        choice["message"]["content"] = "é"
        first, second = choice["logprobs"]["content"][:2]
        first |= {"token": "\ufffd", "bytes": [0xC3]}
        second |= {"token": "\ufffd", "bytes": [0xA9], "top_logprobs": second["top_logprobs"][:1]}
        choice["logprobs"]["content"] = [first, second]

    upstream.plan.append(answers(split))
    answer = generation().ask(logprobs=True, top_logprobs=2)

    assert answer.logprobs is not None
    assert b"".join(token.bytes for token in answer.logprobs).decode() == answer.text
    assert [len(token.top) for token in answer.logprobs] == [2, 1]
    assert answer.logprobs.ids[1, 2] == -1


def test_a_text_is_completed(generation: Make, upstream: Upstream) -> None:
    """It goes to the older path as it is, with the options that this has; pieces are the answer's text."""
    hosted = generation()
    pieces: list[str] = []
    streamed = hosted.ask(pieces.append, mode="complete", prompt="<s>Ada", top_k=4)
    several = hosted.ask_all(mode="complete", prompt="<s>Ada", n=2)

    assert [seen.path for seen in upstream.seen] == ["/v1/completions"] * 2
    sent = upstream.seen[0].body
    assert (sent["prompt"], sent["top_k"], "messages" in sent) == ("<s>Ada", 4, False)
    assert (streamed.text, pieces, hosted.prompt.n_tokens) == ("".join(ANSWER), ANSWER, 11)
    assert [answer.text for answer in several] == ["".join(ANSWER), "".join(ANSWER) + "!"]


def test_thoughts_are_told_apart(generation: Make, upstream: Upstream) -> None:
    """Reasoning comes as pieces of its own; an answer that the limit cut in thought has no text."""
    delta = [{"reasoning_content": "Hm, "}, {"reasoning_content": "turbines."}, {"content": "Ada."}]

    def think(handler: Any, body: dict[str, Any]) -> None:
        handler.event_stream()
        for piece in delta:
            handler.event({"choices": [{"index": 0, "delta": piece, "finish_reason": None}]})
        handler.end("stop", body)

    def only_think(answer: dict[str, Any]) -> None:
        message = {"content": None, "reasoning": "Hm, turbines."}
        answer["choices"][0] |= {"message": message, "finish_reason": "length"}

    upstream.plan += [think, answers(only_think)]
    pieces: list[str] = []
    hosted = generation()
    spoken = hosted.ask(pieces.append)
    cut = hosted.ask()

    assert [(str(piece), isinstance(piece, Thought)) for piece in pieces] == [
        ("Hm, ", True),
        ("turbines.", True),
        ("Ada.", False),
    ]
    assert (spoken.text, spoken.reasoning) == ("Ada.", "Hm, turbines.")
    assert (cut.text, cut.reasoning, cut.finish_reason) == ("", "Hm, turbines.", "length")


def first(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer's only choice."""
    return answer["choices"][0]


def call_of(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the function of an answer's first call."""
    return first(answer)["message"]["tool_calls"][0]["function"]


@pytest.mark.parametrize(
    ("options", "act", "words"),
    [
        ({"tools": TOOLS}, answers(lambda a: call_of(a).update(arguments='{"city": ')), "no JSON object"),
        ({"tools": TOOLS}, answers(lambda a: call_of(a).update(arguments="[1]")), "no JSON object"),
        ({"tools": TOOLS}, answers(lambda a: call_of(a).update(name="")), "no name"),
        ({"n": 3}, answers(lambda a: a["choices"].pop()), "2 answers, not 3"),
        ({}, answers(lambda a: a["choices"].append(first(a))), "2 answers, not 1"),
        ({}, answers(lambda a: first(a)["message"].update(content=None)), "no text"),
        ({"logprobs": True}, answers(lambda a: first(a).pop("logprobs")), "log-probabilities are missing"),
        (
            {"logprobs": True, "top_logprobs": 2},
            answers(lambda a: [one.pop("top_logprobs") for one in first(a)["logprobs"]["content"]]),
            "log-probabilities are missing",
        ),
        (
            {"logprobs": True},
            answers(lambda a: first(a)["logprobs"]["content"][0].update(logprob=math.nan)),
            "no number",
        ),
        (
            {"logprobs": True, "mode": "complete"},
            answers(lambda a: first(a)["logprobs"]["tokens"].pop()),
            "Error while",
        ),
    ],
)
def test_what_an_answer_lacks_is_asked_for_again(
    generation: Make, upstream: Upstream, options: dict[str, Any], act: Act, words: str
) -> None:
    """One such answer costs a request; four are the end of it."""
    hosted = generation()
    upstream.plan.append(act)
    hosted.ask_all(**options)
    assert len(upstream.seen) == 2

    upstream.always = lambda _: act
    with pytest.raises(UpstreamAnswerError, match=words):
        hosted.ask_all(**options)
    assert len(upstream.seen) == 6


def test_an_option_that_a_server_ignores_does_not_break_it(generation: Make, upstream: Upstream) -> None:
    """Answers without what one job asked for are that job's failure: others are answered meanwhile."""
    hosted = generation()
    upstream.always = lambda seen: answers(lambda a: a["choices"].pop()) if seen.body.get("n") else None
    for _ in range(2):
        with pytest.raises(UpstreamAnswerError, match="1 answers, not 2"):
            hosted.ask_all(n=2)

    assert hosted.dispatcher.trouble() == ""
    assert hosted.ask().text == "".join(ANSWER)


def test_bad_calls_in_a_stream_are_not_begun_again(generation: Make, upstream: Upstream) -> None:
    """Text was passed on: the reader hears that the calls behind it are of no use."""

    def call(handler: Any, body: dict[str, Any]) -> None:
        handler.event_stream()
        handler.event({"choices": [{"index": 0, "delta": {"content": "Let me see."}}]})
        handler.call_piece({"index": 0, "id": "a", "function": {"name": "weather", "arguments": "{"}})
        handler.end("tool_calls", body)

    upstream.plan.append(call)
    with pytest.raises(UpstreamAnswerError, match="no JSON object"):
        generation().ask([].append, tools=TOOLS)
    assert len(upstream.seen) == 1


def test_calls_that_the_limit_cut_are_left_out(generation: Make, upstream: Upstream) -> None:
    """Those that are whole come back; the finish reason says that there was more."""

    def cut(answer: dict[str, Any]) -> None:
        first(answer)["message"]["tool_calls"][1]["function"]["arguments"] = '{"ci'
        first(answer)["finish_reason"] = "length"

    upstream.plan.append(answers(cut))
    answer = generation().ask(tools=TOOLS)

    assert (answer.tool_calls, answer.finish_reason) == (CALLS[:1], "length")


def test_what_a_server_does_not_take_is_refused(generation: Make, upstream: Upstream) -> None:
    """One request, and the server's status."""
    hosted = generation()
    upstream.always = lambda seen: says(404) if seen.path == "/v1/completions" else says(400)
    for options, status in (({"mode": "complete"}, 404), ({"tools": TOOLS}, 400), ({"n": 2}, 400)):
        with pytest.raises(UpstreamRefusedError, match=str(status)):
            hosted.ask_all(**options)
    assert len(upstream.seen) == 3


def test_cost_counts_all_answers_and_tools(generation: Make) -> None:
    """What a rate limit is asked for holds every answer's tokens, and the tools that the model reads."""
    engine = generation().engine

    def cost(**options: object) -> int:
        return engine.prepare(GenerateRequest.parse({"model": "m", "prompt": "Who?"} | options)).cost_tokens

    assert cost(n=3, max_new_tokens=100) - cost(n=1, max_new_tokens=100) == 200
    assert cost(tools=TOOLS) - cost() > len(json.dumps(TOOLS)) / 5


def test_calls_are_ready_for_history(generation: Make, upstream: Upstream) -> None:
    """Arguments as an object, none at all, or a call without id, as some servers have them, are mended."""

    def mend(answer: dict[str, Any]) -> None:
        weather, clock = first(answer)["message"]["tool_calls"]
        weather["function"]["arguments"] = {"city": "Paris"}
        clock["function"]["arguments"] = ""
        clock.pop("id")

    upstream.plan.append(answers(mend))
    calls = generation().ask(tools=TOOLS).tool_calls

    assert calls is not None
    assert [call["function"]["arguments"] for call in calls] == [ARGUMENTS, "{}"]
    assert all(call["id"] for call in calls)
    Message.model_validate({"role": "assistant", "tool_calls": calls})
