"""Conversations through a real worker: thinking apart, tools, texts to complete, long prompts."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, GenerationConfig, PhiConfig

from penstock import AsyncClient, Client, InvalidOptionError, Piece, Tool
from tests.deployment import Server, WorkerProcess
from tests.models.test_chat import OPENS, WEATHER
from tests.models.test_generation import SIZES, make_tokenizer

TOML = """
[models.thinker]
task = "generate"
source = "{folder}"
generation = {{ max_new_tokens = 60, temperature = 1.0 }}
"""


def make_thinker(folder: Path) -> Path:
    """Write a model that says any letters, and now and then that it has thought enough."""
    tokenizer = make_tokenizer(OPENS)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    tokenizer.save_pretrained(folder)
    config = PhiConfig(**SIZES | {"vocab_size": 330, "initializer_range": 0.01})
    model = AutoModelForCausalLM.from_config(config)
    bias = model.lm_head.bias.data.fill_(-20)
    bias[tokenizer.convert_tokens_to_ids(list("abcdefgh"))] = 0.0
    bias[tokenizer.convert_tokens_to_ids("</think>")] = 0.0
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def thinker(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Return a client of a worker whose model thinks."""
    folder = tmp_path_factory.mktemp("thinker")
    toml = TOML.format(folder=make_thinker(folder / "model"))
    process = WorkerProcess(folder, server, toml=toml, queues="cpu.thinker")
    try:
        process.wait_until_ready()
        with Client(server.broker_url) as client:
            yield client
    finally:
        process.stop()


def test_streamed_pieces_say_what_is_thought(thinker: Client) -> None:
    """Reasoning comes first and apart, and all pieces together are the stored answer."""
    answer = thinker.generate("Think.", model="thinker", seed=3)
    pieces: list[Piece] = list(thinker.stream("Think.", model="thinker", seed=3))

    assert answer.reasoning
    assert answer.text
    assert "think>" not in answer.reasoning
    assert "".join(piece.reasoning for piece in pieces) == answer.reasoning
    assert "".join(piece.text for piece in pieces) == answer.text
    assert pieces[-1].usage == answer.usage
    kinds = [bool(piece.reasoning) for piece in pieces if piece.reasoning or piece.text]
    assert kinds == sorted(kinds, reverse=True)


def test_a_format_holds_behind_the_thoughts(thinker: Client) -> None:
    """Thoughts are free, the text is one of the choices."""
    choice = {"type": "choice", "choices": ["yes", "no"]}

    answer = thinker.generate("Think.", model="thinker", seed=3, response_format=choice)  # type: ignore[arg-type]  # a plain dict

    assert answer.reasoning
    assert answer.text in ("yes", "no")


def test_a_text_is_completed(thinker: Client, server: Server) -> None:
    """No template: no thoughts, and fewer tokens; both clients and the stream do the same."""
    answer = thinker.generate("abc", model="thinker", mode="complete", seed=5)
    streamed = "".join(p.text for p in thinker.stream("abc", model="thinker", mode="complete", seed=5))

    async def ask() -> str:
        async with AsyncClient(server.broker_url) as client:
            return (await client.generate("abc", model="thinker", mode="complete", seed=5)).text

    assert answer.reasoning is None
    assert answer.usage.prompt_tokens == len(make_tokenizer()("abc")["input_ids"])
    assert answer.text == streamed == asyncio.run(ask())


def test_cut_tokens_are_counted(thinker: Client) -> None:
    """A prompt whose middle was cut says so, also on the last piece of a stream."""
    long = "water " * 2000

    answer = thinker.generate(long, model="thinker", truncation="middle", max_new_tokens=4)
    *_, last = thinker.stream(long, model="thinker", truncation="middle", max_new_tokens=4)

    assert answer.usage.cut_tokens is not None
    assert answer.usage.prompt_tokens <= 512 - 4
    assert last.usage is not None
    assert last.usage.cut_tokens == answer.usage.cut_tokens


def test_what_a_template_cannot_is_told(thinker: Client) -> None:
    """Tools and a switch that it does not know come back as typed errors, and the worker lives."""
    tools: list[Tool] = [WEATHER]

    with pytest.raises(InvalidOptionError, match="no place for them"):
        thinker.generate("Rain?", model="thinker", tools=tools)
    with pytest.raises(InvalidOptionError, match="no such switch"):
        thinker.generate("Rain?", model="thinker", enable_thinking=False)
    assert (
        thinker.generate(None, model="thinker", history=[{"role": "user", "content": "Rain?"}], seed=1).text
        == thinker.generate("Rain?", model="thinker", seed=1).text
    )


def test_results_without_anything_new_are_as_before(thinker: Client, server: Server) -> None:
    """Clients of an earlier version read answers that have neither thoughts nor calls."""
    job = thinker.submit_generate("abc", model="thinker", mode="complete", max_new_tokens=2)
    job.result()

    with redis.Redis.from_url(server.results_url) as store:
        payload = store.get(f"celery-task-meta-{job.id}")
    assert isinstance(payload, bytes)
    header = json.loads(payload[8:])
    assert not {"reasoning", "tool_calls"} & set(header["result"])
    assert set(header["result"]["usage"]) == {"__record__", "prompt_tokens", "completion_tokens"}
