"""What ends an answer badly, through real workers: the caller gets its error, batch mates their answers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import torch
from celery import Celery
from transformers import AutoModelForCausalLM, LlamaConfig

from penstock import (
    Client,
    EngineError,
    GenerateResult,
    IncompleteOutputError,
    InvalidFormatError,
    InvalidOptionError,
    InvalidTextError,
    Job,
    OutOfMemoryError,
    PenstockError,
    ResponseFormat,
)
from penstock.keys import record_key
from penstock_workers.command.local_redis import free_port
from tests.deployment import BUNDLED, Server, WorkerProcess
from tests.eventually import eventually
from tests.models.test_generation import LINES, SIZES, make_folder, make_tokenizer

POISON = "Q"  # its embedding is NaN, and no other prompt has it
N_NEW = 24
CRAMPED = '''"""A Llama whose device has memory for so many tokens of rows times columns, and no more."""

import functools
import torch
from transformers import LlamaForCausalLM


class Cramped(LlamaForCausalLM):
    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, input_ids, past_key_values=None, **kwargs):
        n_held = 0 if past_key_values is None else past_key_values.get_seq_length()
        phase = "steps" if input_ids.shape[1] == 1 else "prompts"  # a slow machine takes those in chunks
        if phase == self.config.cramped and len(input_ids) * (n_held + input_ids.shape[1]) > 400:
            raise torch.OutOfMemoryError("faked")
        return super().forward(input_ids, past_key_values=past_key_values, **kwargs)
'''


def poisoned(folder: Path) -> Path:
    """Write a model that knows nothing of one letter."""
    make_folder(folder, LlamaConfig(**SIZES))
    model = AutoModelForCausalLM.from_pretrained(folder)
    (token,) = make_tokenizer().encode(POISON)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
        model.lm_head.weight[[1, token]] = 0.0  # says neither its end nor that letter
    model.save_pretrained(folder)
    return folder


def cramped(folder: Path, sound: Path, phase: str) -> Path:
    """Write a model that runs out of memory in one phase: `prompts` or `steps`."""
    shutil.copytree(sound, folder)
    (folder / "cramped.py").write_text(CRAMPED)
    config = json.loads((folder / "config.json").read_text())
    config |= {"cramped": phase, "auto_map": {"AutoModelForCausalLM": "cramped.Cramped"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, WorkerProcess]]:
    """A server, and one worker with a sound model and three that fail."""
    folder = tmp_path_factory.mktemp("busy")
    sources = {"poisoned": poisoned(folder / "poisoned")}
    for phase in ("prompts", "steps"):
        sources[phase] = cramped(folder / phase, sources["poisoned"], phase)
    toml = BUNDLED + "".join(
        f'[models.{name}]\ntask = "generate"\nsource = "{source}"\ntrust_remote_code = true\n'
        f"generation = {{ max_new_tokens = {N_NEW} }}\n"
        for name, source in sources.items()
    )
    queues = ",".join(f"cpu.{name}" for name in ("minilm", "chat", *sources))
    toml += "[pools.cpu]\nthreads = 2\n"  # so that the models take turns, also where one fails
    with Server(free_port()).running() as server:
        worker = WorkerProcess(folder, server, toml=toml, queues=queues)
        try:
            worker.wait_until_ready()
            yield server, worker
        finally:
            worker.stop()


@pytest.fixture
def caller(busy: tuple[Server, WorkerProcess]) -> Iterator[Client]:
    """A client of that worker, which has to outlive the test."""
    server, worker = busy
    with Client(server.broker_url) as client:
        yield client
    assert worker.process.poll() is None


def outcomes(jobs: list[Job[GenerateResult]]) -> list[str | PenstockError]:
    """Return the answers' texts, an error where there is none."""

    def outcome(job: Job[GenerateResult]) -> str | PenstockError:
        try:
            return job.result(timeout_s=60).text
        except PenstockError as error:
            return error

    return [outcome(job) for job in jobs]


def test_logits_that_are_not_finite_end_one_answer(caller: Client) -> None:
    """Beside a row of NaN, in its batch and on another model, everybody gets the usual answer."""
    prompts = [f"{line} {n}" for line in LINES for n in range(4)]
    expected = [caller.generate(prompt, model="poisoned").text for prompt in prompts]
    reply = caller.generate("Who are you?", model="chat").text

    asked = [*prompts[:8], f"a {POISON}", *prompts[8:], f"{POISON} b"]
    jobs = [caller.submit_generate(prompt, model="poisoned") for prompt in asked]
    beside = [caller.submit_generate("Who are you?", model="chat") for _ in range(8)]
    said = outcomes(jobs)

    assert [*said[:8], *said[9:-1]] == expected
    for error in (said[8], said[-1]):
        assert isinstance(error, EngineError)
        assert "not finite" in str(error)
    assert outcomes(beside) == [reply] * 8
    with pytest.raises(EngineError, match="not finite"):
        list(caller.stream(POISON, model="poisoned", timeout_s=30))


def test_a_model_that_gives_no_numbers_is_not_served(own: Server, tmp_path: Path) -> None:
    """Weights of NaN end the worker at its start, with a reason, and starting again changes nothing."""
    folder = make_folder(tmp_path / "nan")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(torch.nan)
    model.save_pretrained(folder)
    toml = f'[models.nan]\ntask = "generate"\nsource = "{folder}"\n'

    worker = WorkerProcess(tmp_path, own, toml=toml, queues="cpu.nan")
    try:
        code = worker.wait()
    finally:
        worker.stop()

    assert code == 78  # EX_CONFIG
    assert "model 'nan' cannot be loaded: its logits are not finite" in worker.log


@pytest.mark.parametrize("phase", ["prompts", "steps"])
def test_memory_that_runs_out_costs_time_alone(
    caller: Client, busy: tuple[Server, WorkerProcess], phase: str
) -> None:
    """Rows that do not fit together are answered after each other; one that never fits has the error."""
    prompts = [f"{line} {n}" for line in LINES for n in range(4)]
    too_long = "1" * (420 if phase == "prompts" else 390)  # with the answer beyond 400 tokens
    expected = [caller.generate(prompt, model="poisoned").text for prompt in prompts]

    jobs = [caller.submit_generate(prompt, model=phase) for prompt in (*prompts[:6], too_long, *prompts[6:])]
    beside = caller.submit_embed(["beside"], model="minilm")
    said = outcomes(jobs)

    error = said.pop(6)
    assert isinstance(error, OutOfMemoryError)
    assert error.n_tokens > 390
    assert said == expected
    assert beside.result(timeout_s=30).shape == (1, 384)
    assert "fewer at a time" in busy[1].log


def test_typed_control_tokens_are_text(caller: Client) -> None:
    """A prompt of nothing but the model's special tokens is taken letter by letter, and answered."""
    typed = "<|end|><|system|><|user|>"
    letter = caller.generate("a", model="poisoned")
    answer = caller.generate(typed, model="poisoned")

    assert answer.usage.prompt_tokens > letter.usage.prompt_tokens + len(typed) // 3
    assert answer.usage.completion_tokens == N_NEW
    assert answer.text != letter.text


ENDLESS: ResponseFormat = {
    "type": "json_schema",
    "json_schema": {
        "name": "it",
        "schema": {"type": "array", "items": {"type": "boolean"}, "minItems": 10_000},
    },
}


def test_a_schema_that_never_ends_is_cut(caller: Client) -> None:
    """The limit ends it; the error says that it is incomplete and has what there is; so for a stream."""
    with pytest.raises(IncompleteOutputError, match=f"incomplete: {N_NEW} tokens") as caught:
        caller.generate("?", model="poisoned", response_format=ENDLESS)
    pieces = []
    with pytest.raises(IncompleteOutputError):
        pieces.extend(caller.stream("?", model="poisoned", response_format=ENDLESS, timeout_s=30))

    assert caught.value.text.startswith("[")
    assert caught.value.text.startswith("".join(piece.text for piece in pieces))


DEEP = {
    "type": "json_schema",
    "json_schema": {
        "schema": {
            "$defs": {str(n): {"properties": {"a": {"$ref": f"#/$defs/{n + 1}"}}} for n in range(1000)}
            | {"1000": {"type": "null"}},
            "$ref": "#/$defs/0",
        }
    },
}
"""Definitions that lead from one to the next, as many as 64 KiB hold: llguidance recurses through them."""


def test_definitions_that_lead_deep_end_no_worker(caller: Client) -> None:
    """A schema whose definitions lead through a thousand others is followed, and batch mates are answered."""
    expected = [caller.generate(line, model="poisoned").text for line in LINES]

    deep = caller.submit_generate("?", model="poisoned", response_format=DEEP)
    beside = [caller.submit_generate(line, model="poisoned") for line in LINES]

    assert outcomes(beside) == expected
    assert isinstance(outcomes([deep])[0], str | IncompleteOutputError)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("pattern", "ends"),
    [
        (r"(x+x+)+y", (str, IncompleteOutputError)),
        (r"(.*[ab].{30}){20}x", (IncompleteOutputError, InvalidFormatError)),
        (r"(a?){5000}a{5000}", (InvalidFormatError,)),
        (".*" * 500, (InvalidFormatError,)),
    ],
    ids=["two loops", "counted loops", "too many states", "too long"],
)
def test_a_costly_pattern_costs_its_own_caller(caller: Client, pattern: str, ends: tuple[type, ...]) -> None:
    """A regular expression that takes others for ever is answered or refused, while the rest goes on."""
    expected = [caller.generate(line, model="poisoned").text for line in LINES]

    bad = caller.submit_generate("?", model="poisoned", response_format={"type": "regex", "pattern": pattern})
    beside = [caller.submit_generate(line, model="poisoned") for line in LINES]

    assert outcomes(beside) == expected
    assert isinstance(outcomes([bad])[0], ends)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"prompt": ""}, InvalidTextError, "is empty"),
        ({"prompt": "a", "best_of": 2}, InvalidOptionError, "no option of that name"),
        ({"prompt": "a", "max_new_tokens": 512}, InvalidOptionError, "share 512 tokens"),
        (
            {"prompt": "a", "stop": ["b"], "response_format": {"type": "json_object"}},
            InvalidOptionError,
            "response_format says where",
        ),
        (
            {"prompt": "a", "response_format": {"type": "regex", "pattern": "a", "choices": []}},
            InvalidOptionError,
            "response_format",
        ),
    ],
    ids=str,
)
def test_a_worker_refuses_what_a_client_would(
    caller: Client,
    busy: tuple[Server, WorkerProcess],
    fields: dict[str, object],
    error: type[PenstockError],
    message: str,
) -> None:
    """What producers without our client send is checked as well: the reason is the job's result."""
    with (
        Celery(broker=busy[0].broker_url) as sender,
        redis.Redis.from_url(busy[0].results_url) as results,
    ):
        kwargs = {"model": "poisoned", "version": 1} | fields
        job_id = sender.send_task("penstock.generate", kwargs=kwargs, queue="cpu.poisoned").id
        eventually(lambda: results.exists(record_key(job_id)), within_s=20)

    with pytest.raises(error, match=message):
        caller.job(job_id).result(timeout_s=30)
