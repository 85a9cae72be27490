"""Do requests that come and go cost what a batch formed beforehand costs?

A random Llama of 32 million parameters (no download, no real text) answers prompts of 8 to 128 tokens with
64 tokens each, greedily, in this process, on one thread per core. Ours is the worker's scheduler, with its
thread and its queue; peers are transformers' `generate` on a batch that is formed beforehand, `generate`
one by one, and transformers' own continuous batching. Ways take turns; medians are compared. The section
`beside` embeds single texts with the bundled model while sixteen such requests are answered without end.
The bundled chat model, sixteen requests at a time, shows what a token costs more in a `response_format`
(`formats`, in this process), and what streaming costs (`streaming`, through client, Redis and a worker).

Run: python -m benchmarks.generation [--quick] [--only SECTION ...] [--json FILE] [--plot FILE]
"""

import logging
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.deployment import deployed
from benchmarks.report import Figure, Row, arguments
from benchmarks.sections import Results
from penstock.conversation import ResponseFormat
from penstock.request import EmbedRequest, GenerateRequest
from penstock_workers.batching.batcher import Batcher
from penstock_workers.batching.feed import Job
from penstock_workers.batching.scheduler import Scheduler
from penstock_workers.batching.turns import Device, Turn
from penstock_workers.embedding.embedder import Embedder
from penstock_workers.generation.batch_mode import BatchMode
from penstock_workers.generation.decoding import Decoding
from penstock_workers.generation.generator import Generator
from penstock_workers.generation.loading import pause_between_layers
from penstock_workers.generation.mode_trial import find_batch_mode
from penstock_workers.generation.sampling_params import SamplingParams
from penstock_workers.generation.sequence import ScheduledSequence, TokenSequence
from penstock_workers.serving.loading import cut_texts
from penstock_workers.serving.models import DEFAULT_SHARES
from penstock_workers.settings import ModelSettings

N_NEW = 64
CHAT = "bundled:tiny-chat"
ASKED = "Tell me about water."
GREEDY = SamplingParams(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, seed=1
)
HOT = replace(GREEDY, temperature=1.0, top_p=0.9)


@dataclass(frozen=True)
class Ask:
    """A prompt and what is wanted of it."""

    ids: tuple[int, ...]
    n_new: int = N_NEW
    sampling: SamplingParams = GREEDY

    @property
    def n_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.ids)


@dataclass
class Times:
    """When one request of a stream was answered, seconds after it came."""

    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)


Found = tuple[list[Row], dict[str, Figure]]


def main() -> None:
    sections: dict[str, Callable[[PreTrainedModel], Found]] = {
        "throughput": lambda model: throughput(model, n_rounds=1 if quick else 5, with_64=not quick),
        "steps": lambda model: step_overhead(model, n_rounds=5 if quick else 15),
        "arrivals": lambda model: arrivals(model, n_requests=8 if quick else 60),
        "shared": lambda model: shared_prompts(model, n_rounds=1 if quick else 5),
        "equality": lambda _: equality(n_requests=60 if quick else 200),
        "endurance": lambda _: endurance(n_requests=500 if quick else 10_000),
        "formats": lambda _: formats(n_rounds=2 if quick else 7),
        "streaming": lambda _: streaming(n_rounds=2 if quick else 7),
        "beside": lambda model: beside(model, n_texts=50 if quick else 150, n_rounds=1 if quick else 5),
    }
    options = arguments(__doc__, list(sections))
    quick = options.quick
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # not annotated
    torch.set_num_threads(os.cpu_count() or 1)
    model = make_model()
    results = Results()
    for name in options.only:
        with results.section(name):
            results.add(name, *sections[name](model))
    results.finish("generation", options)


def make_model(**fields: Any) -> PreTrainedModel:
    """Return a random Llama; no token ends an answer."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "max_position_embeddings": 2048,
        "eos_token_id": None,
    }
    make: Any = AutoModelForCausalLM.from_config  # not annotated
    model: PreTrainedModel = make(LlamaConfig(**sizes | fields)).eval().requires_grad_(False)
    model.generation_config = GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]  # not annotated
    return model


def make_asks(n: int, *, seed: int = 1, vocab: int = 8192) -> list[Ask]:
    """Return prompts of 8 to 128 random tokens."""
    dice = random.Random(seed)
    return [Ask(tuple(dice.randrange(1, vocab) for _ in range(dice.randrange(8, 129)))) for _ in range(n)]


def start(
    model: PreTrainedModel, *, max_rows: int
) -> Scheduler[Ask, ScheduledSequence[list[int]], list[int]]:
    """Start a worker's scheduler; its answers are tokens."""
    return Scheduler("benchmark", make_decoding(model, max_rows=max_rows), make_line)


def make_decoding(model: PreTrainedModel, *, max_rows: int, budget: int = 1 << 20) -> Decoding[list[int]]:
    """Return an empty batch."""
    return Decoding("benchmark", model, BatchMode.CONTINUOUS, max_rows=max_rows, budget_tokens=budget)


def make_line(
    ask: Ask,
    /,
    *,
    is_over: Callable[[], bool] = lambda: False,
    on_start: Callable[[], None] = lambda: None,
    on_piece: Callable[[str], None] | None = None,
) -> ScheduledSequence[list[int]]:
    """Return a row that ends after the tokens that were asked for; a piece is a token."""
    tokens = TokenSequence(sampling=ask.sampling, prompt=ask.ids)

    def take(token: int) -> list[int] | None:
        if on_piece:
            on_piece(str(token))
        return tokens.output if len(tokens.output) == ask.n_new else None

    return ScheduledSequence(tokens, ask.n_new, take=take, is_over=is_over, on_start=on_start)


@torch.inference_mode()
def generate(model: PreTrainedModel, asks: Sequence[Ask]) -> list[list[int]]:
    """Answer a batch with transformers' own loop, padded on the left."""
    width, n_new = max(ask.n_tokens for ask in asks), max(ask.n_new for ask in asks)
    ids = torch.tensor([[0] * (width - ask.n_tokens) + list(ask.ids) for ask in asks])
    mask = torch.tensor([[0] * (width - ask.n_tokens) + [1] * ask.n_tokens for ask in asks])
    peer: Any = model  # its `generate` is not annotated
    out = peer.generate(ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False)
    return [row[: ask.n_new] for row, ask in zip(out[:, width:].tolist(), asks, strict=True)]


def generate_continuous(model: PreTrainedModel, asks: Sequence[Ask]) -> list[list[int]]:
    """Answer with transformers' continuous batching."""
    untyped: Any = GenerationConfig  # not annotated
    config = untyped(max_new_tokens=N_NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    peer: Any = model  # not annotated
    try:
        out = peer.generate_batch(
            [list(ask.ids) for ask in asks], generation_config=config, progress_bar=False
        )
    finally:
        model.set_attn_implementation("sdpa")  # it leaves another one behind
    return [list(one.generated_tokens) for one in out.values()]


def throughput(model: PreTrainedModel, *, n_rounds: int, with_64: bool) -> Found:
    """Compare whole batches."""
    schedulers = {n: start(model, max_rows=n) for n in (16, 64)}
    asks = make_asks(64)

    def ours(n: int) -> list[list[int]]:
        works = [schedulers[n].submit(Job(id=str(i)), [ask]) for i, ask in enumerate(asks[:n])]
        return [work.wait()[0] for work in works]

    ways: dict[str, tuple[int, Callable[[], list[list[int]]]]] = {
        "penstock, 16 at once": (16, lambda: ours(16)),
        "transformers generate, static batch of 16": (16, lambda: generate(model, asks[:16])),
        "transformers generate, one by one": (2, lambda: [generate(model, [a])[0] for a in asks[:2]]),
        "transformers continuous batching, 16 at once": (16, lambda: generate_continuous(model, asks[:16])),
    }
    if with_64:
        ways["penstock, 64 at once"] = (64, lambda: ours(64))
        ways["transformers generate, static batch of 64"] = (64, lambda: generate(model, asks))
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(n_rounds + 1):  # the first is a warm-up
        for name, (n, way) in ways.items():
            began = time.perf_counter()
            answers = way()
            speeds[name].append(n * N_NEW / (time.perf_counter() - began))
            assert [len(answer) for answer in answers] == [N_NEW] * n
    rows = [Row(way=name, unit="tokens/s", values=values[1:]) for name, values in speeds.items()]
    median = {row.way: row.median for row in rows}
    static = [
        median[f"penstock, {n} at once"] / median[f"transformers generate, static batch of {n}"]
        for n in ((16, 64) if with_64 else (16,))
    ]
    mine, theirs = median["penstock, 16 at once"], median["transformers continuous batching, 16 at once"]
    return rows, {
        "vs_static_batch": Figure(value=min(static), unit="x", goal=0.9),
        "vs_transformers_cb": Figure(value=mine / theirs, unit="x", goal=3.0),
        "vs_one_by_one": Figure(value=mine / median["transformers generate, one by one"], unit="x"),
    }


@torch.inference_mode()
def step_overhead(model: PreTrainedModel, *, n_rounds: int) -> Found:
    """Compare a decode step, sampling and bookkeeping included, with the bare forward pass."""
    width, rows, ratios = 64, [], []
    for n in (1, 2, 4, 8, 16, 32, 64):
        asks = [Ask(ids=tuple(range(1, width + 1)), n_new=1 << 20)] * n
        decoding = make_decoding(model, max_rows=n, budget=1 << 60)
        for ask in asks:
            decoding.add(make_line(ask))
        while decoding.n_running < n:
            decoding.step()
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([ask.ids for ask in asks])
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        bare, ours = [], []
        for i in range(n_rounds + 1):
            token, at = torch.ones(n, 1, dtype=torch.long), width + i
            mask, positions = torch.ones(n, at + 1, dtype=torch.long), torch.full((n, 1), at)
            began = time.perf_counter()
            model(
                input_ids=token,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            middle = time.perf_counter()
            decoding.step()
            bare.append(middle - began)
            ours.append(time.perf_counter() - middle)
        for way, seconds in (("penstock", ours), ("bare forward", bare)):
            rows.append(Row(way=f"one step of {n}, {way}", unit="ms", values=[1e3 * s for s in seconds[1:]]))
        ratios.append(statistics.median(ours[1:]) / statistics.median(bare[1:]))
    return rows, {"step_overhead": Figure(value=max(ratios), unit="x", goal=1.1, at_most=True)}


def arrivals(model: PreTrainedModel, *, n_requests: int) -> Found:
    """Let requests arrive at random, at half of what batches of 16 sustain; seconds to first and last."""
    asks = make_asks(n_requests, seed=2)
    began = time.perf_counter()
    generate(model, asks[:16])
    capacity = min(16, n_requests) / (time.perf_counter() - began)
    dice, now, at = random.Random(3), 0.0, []
    for _ in asks:
        now += dice.expovariate(capacity / 2)
        at.append(now)
    found = {
        "penstock": stream_ours(model, asks, at),
        "static batches of up to 16": stream_formed(model, asks, at, most=16),
    }
    if n_requests <= 8:  # one by one falls behind without end
        found["one by one"] = stream_formed(model, asks, at, most=1)
    rows = []
    for way, times in found.items():
        rows.append(Row(way=f"arrivals, {way}: first token", unit="s", values=times.first))
        rows.append(Row(way=f"arrivals, {way}: last token", unit="s", values=times.last))
    mine, theirs = found["penstock"], found["static batches of up to 16"]
    return rows, {
        "first_token_vs_static": Figure(
            value=statistics.median(theirs.first) / statistics.median(mine.first), unit="x", goal=1.0
        ),
        "last_token_vs_static": Figure(
            value=statistics.median(theirs.last) / statistics.median(mine.last), unit="x", goal=1.0
        ),
    }


def stream_ours(model: PreTrainedModel, asks: Sequence[Ask], at: Sequence[float]) -> Times:
    """Send each request when its time has come."""
    scheduler, times, began = start(model, max_rows=16), Times(), time.perf_counter()
    first: dict[int, float] = {}
    threads = []
    for index, (ask, when) in enumerate(zip(asks, at, strict=True)):
        time.sleep(max(0.0, began + when - time.perf_counter()))

        def listen(_: int, __: str, index: int = index, when: float = when) -> None:
            first.setdefault(index, time.perf_counter() - began - when)

        work = scheduler.submit(Job(id=str(index)), [ask], listen=listen)

        def wait(work: Any = work, when: float = when) -> None:
            work.wait()
            times.last.append(time.perf_counter() - began - when)

        threads.append(threading.Thread(target=wait))
        threads[-1].start()
    for thread in threads:
        thread.join()
    times.first = list(first.values())
    return times


def stream_formed(model: PreTrainedModel, asks: Sequence[Ask], at: Sequence[float], *, most: int) -> Times:
    """Answer whoever waits, in batches; all of an answer is there when its batch is."""
    times, began = Times(), time.perf_counter()
    left = list(zip(asks, at, strict=True))
    while left:
        time.sleep(max(0.0, began + left[0][1] - time.perf_counter()))
        now = time.perf_counter() - began
        batch = [one for one in left if one[1] <= now][:most]
        left = left[len(batch) :]
        generate(model, [ask for ask, _ in batch])
        now = time.perf_counter() - began
        times.last += [now - when for _, when in batch]
    times.first = times.last
    return times


def shared_prompts(model: PreTrainedModel, *, n_rounds: int) -> Found:
    """Send 16 requests at once, whose prompts begin alike or do not; seconds to the first token of each."""
    kinds = ("begin with the same 512 tokens", "have nothing in common")
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for round_ in range(n_rounds + 1):  # the first is a warm-up
        for kind in kinds:
            system = make_words(512, seed=round_)
            asks = [
                replace(
                    ask, ids=(system if kind == kinds[0] else make_words(512, seed=100 + index)) + ask.ids
                )
                for index, ask in enumerate(make_asks(16, seed=round_))
            ]
            times = stream_ours(model, asks, [0.0] * len(asks))
            if round_:
                found[kind].append(statistics.median(times.first))
    rows = [Row(way=f"16 prompts that {kind}: first token", unit="s", values=v) for kind, v in found.items()]
    return rows, {"shared_prompt": Figure(value=rows[1].median / rows[0].median, unit="x", goal=2.0)}


def make_words(n: int, *, seed: int) -> tuple[int, ...]:
    """Return random tokens."""
    dice = random.Random(seed)
    return tuple(dice.randrange(1, 8192) for _ in range(n))


def equality(*, n_requests: int) -> Found:
    """Count answers that batch mates change, among requests that come and go at random."""
    # Small, with large weights: decisive logits, so that rounding does not choose between tokens.
    model = make_model(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    differ: dict[str, float] = {}
    for name, sampling in (("greedy", GREEDY), ("seeded", HOT)):
        dice = random.Random(4)
        asks = [
            replace(ask, n_new=dice.randrange(1, N_NEW), sampling=replace(sampling, seed=index))
            for index, ask in enumerate(make_asks(n_requests, seed=5, vocab=1024))
        ]
        lines, decoding = [make_line(ask) for ask in asks], make_decoding(model, max_rows=16)
        coming = list(lines)
        while coming or not decoding.is_idle:
            while coming and (dice.random() < 0.2 or decoding.is_idle):
                decoding.add(coming.pop(0))
            decoding.step()
        differ[name] = sum(
            line.tokens.output != (generate(model, [ask])[0] if name == "greedy" else alone(model, ask))
            for line, ask in zip(lines, asks, strict=True)
        )
    return [], {
        "greedy_different_from_generate": Figure(value=differ["greedy"], unit="", goal=0, at_most=True),
        "seeded_different_from_alone": Figure(value=differ["seeded"], unit="", goal=0, at_most=True),
    }


def alone(model: PreTrainedModel, ask: Ask) -> list[int]:
    """Answer one request in a batch of its own."""
    line, decoding = make_line(ask), make_decoding(model, max_rows=1)
    decoding.add(line)
    while not decoding.is_idle:
        decoding.step()
    return line.tokens.output


def endurance(*, n_requests: int) -> Found:
    """Send many short requests through a small cache; watch what it allocates and what is left behind."""
    model = make_model(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    _, bytes_per_token = find_batch_mode(model)
    budget, dice = 1000, random.Random(6)
    decoding, most, grown = make_decoding(model, max_rows=32, budget=budget), 0, []
    asks = [
        Ask(tuple(range(1, dice.randrange(2, 24))), n_new=dice.randrange(1, 6)) for _ in range(n_requests)
    ]
    for tenth in range(10):
        for ask in asks[tenth::10]:
            decoding.add(make_line(ask))
        while not decoding.is_idle:
            decoding.step()
            most = max(most, decoding.cache_bytes)
        grown.append(resident_bytes())
    return [Row(way="resident memory after each tenth", unit="MiB", values=[b / 2**20 for b in grown])], {
        "cache_vs_budget": Figure(value=most / (budget * bytes_per_token), unit="x", goal=1.0, at_most=True),
        "growth_mib": Figure(value=(grown[-1] - grown[1]) / 2**20, unit="MiB", goal=4.0, at_most=True),
    }


def beside(model: PreTrainedModel, *, n_texts: int, n_rounds: int) -> Found:
    """Embed single texts, on an idle process and while it generates, with turns on the device and without."""
    settings, cpu = ModelSettings(task="embed", source="bundled:minilm"), torch.device("cpu")
    embedder = Embedder.load("minilm", settings, cpu)
    items = embedder.prepare(EmbedRequest(model="minilm", texts=["How much water does the wheel need?"]))
    device, dice = Device(), random.Random(7)
    embeds, generates = (device.turn(DEFAULT_SHARES[task]) for task in ("embed", "generate"))
    pause_between_layers(model, generates.pause)
    texts: dict[str, list[float]] = {}
    speeds: dict[str, list[float]] = {}

    def embed(batcher: Batcher[Any, Any]) -> list[float]:
        found = []
        for _ in range(n_texts):
            time.sleep(dice.uniform(0.005, 0.03))  # at any moment of a step
            began = time.perf_counter()
            batcher.submit(Job(id="text"), items).wait()
            found.append(1e3 * (time.perf_counter() - began))
        return found

    for _ in range(n_rounds + 1):  # the first is a warm-up
        for way, turns in (("idle", None), ("with turns", (embeds, generates)), ("without", (None, None))):
            cut = cut_texts(settings, embedder, cpu)
            batcher = Batcher("minilm", embedder.run, cut, turns and turns[0])
            if turns is None:
                texts.setdefault("idle", []).append(statistics.median(embed(batcher)))
                continue
            with generating(model, turns[1]) as decoding:
                for what in ("alone", "beside texts"):
                    n_before, began = decoding.n_tokens, time.perf_counter()
                    if what == "alone":
                        time.sleep(n_texts * 0.02)
                    else:
                        texts.setdefault(f"beside generation, {way}", []).append(
                            statistics.median(embed(batcher))
                        )
                    speed = (decoding.n_tokens - n_before) / (time.perf_counter() - began)
                    speeds.setdefault(f"{what}, {way}", []).append(speed)
    rows = [Row(way=f"one text {way}, p50", unit="ms", values=found[1:]) for way, found in texts.items()]
    rows += [Row(way=f"generation {way}", unit="tokens/s", values=s[1:]) for way, s in speeds.items()]
    idle, with_turns, without = (row.median for row in rows[:3])
    return rows, {
        "text_beside_generation": Figure(value=with_turns / idle, unit="x", goal=2.0, at_most=True),
        "text_beside_generation_without_turns": Figure(value=without / idle, unit="x"),
    }


def formats(*, n_rounds: int) -> Found:
    """Answer with a JSON schema, a regular expression, and neither; time of a step of sixteen rows.

    The end-of-sequence token ends no answer here: all rows go on for as long as the longest format.
    """
    engine = Generator.load("chat", ModelSettings(task="generate", source=CHAT), torch.device("cpu"))
    engine.vocabulary._end_ids = frozenset()
    word = {"type": "string", "pattern": "^[a-z]{6}$"}
    words = {"type": "array", "items": word, "minItems": 6, "maxItems": 6}
    schema = {
        "type": "object",
        "properties": {"words": words},
        "required": ["words"],
        "additionalProperties": False,
    }
    ways: dict[str, ResponseFormat | None] = {
        "free": None,
        "JSON schema": {"type": "json_schema", "json_schema": {"schema": schema}},
        "regular expression": {"type": "regex", "pattern": "[a-z]{60}"},
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(n_rounds + 1):  # the first is a warm-up
        for way, wanted in ways.items():
            prompts = [
                engine.prepare(
                    GenerateRequest(
                        model="chat",
                        prompt=ASKED,
                        max_new_tokens=45 if wanted is None else 200,
                        temperature=1.0,
                        seed=100 * round_ + i,
                        response_format=wanted,
                    )
                )
                for i in range(16)
            ]
            scheduler = Scheduler("chat", engine.decoding(max_rows=16), engine.sequence)
            began = time.perf_counter()
            answers = scheduler.submit(Job(id="job"), prompts).wait()
            seconds = time.perf_counter() - began
            if round_:
                found[way].append(1e3 * seconds / max(answer.n_tokens for answer in answers))
    rows = [Row(way=f"a step of 16 requests, {way}", unit="ms", values=v) for way, v in found.items()]
    return rows, {
        f"{name}_us_per_token": Figure(value=1e3 * (row.median - rows[0].median) / 16, unit="us")
        for name, row in zip(("schema", "regex"), rows[1:], strict=True)
    }


def streaming(*, n_rounds: int) -> Found:
    """Ask for whole answers and for streamed ones, sixteen callers at once, and for a first token alone."""
    models = f'[models.chat]\ntask = "generate"\nsource = "{CHAT}"\n'
    speeds: dict[str, list[float]] = {"whole": [], "streamed": []}
    firsts: dict[str, list[float]] = {"answer of one token": [], "first piece": []}
    options: dict[str, Any] = {"model": "chat", "max_new_tokens": 128, "temperature": 1.0}
    with deployed(models, processes=1) as client, ThreadPoolExecutor(16) as pool:

        def answer(seed: int, *, is_streamed: bool) -> int:
            if not is_streamed:
                return client.generate(ASKED, seed=seed, **options).usage.completion_tokens
            *_, last = client.stream(ASKED, seed=seed, **options)
            return last.usage.completion_tokens if last.usage else 0

        for round_ in range(n_rounds + 1):  # the first is a warm-up
            for way, found in speeds.items():
                began = time.perf_counter()
                sent = [
                    pool.submit(answer, 100 * round_ + i, is_streamed=way == "streamed") for i in range(64)
                ]
                n_tokens = sum(one.result() for one in sent)
                if round_:
                    found.append(n_tokens / (time.perf_counter() - began))
        for seed in range(10 * n_rounds):
            began = time.perf_counter()
            client.generate(ASKED, seed=seed, **options | {"max_new_tokens": 1})
            firsts["answer of one token"].append(1e3 * (time.perf_counter() - began))
            began = time.perf_counter()
            next(client.stream(ASKED, seed=seed, **options))  # leaving it cancels the rest
            firsts["first piece"].append(1e3 * (time.perf_counter() - began))
    rows = [Row(way=f"16 callers, {way} answers", unit="tokens/s", values=v) for way, v in speeds.items()]
    rows += [Row(way=f"idle, {way}", unit="ms", values=v) for way, v in firsts.items()]
    return rows, {
        "streamed_vs_whole": Figure(value=rows[1].median / rows[0].median, unit="x"),
        "first_piece_later_ms": Figure(value=rows[3].median - rows[2].median, unit="ms"),
    }


@contextmanager
def generating(model: PreTrainedModel, turn: Turn | None) -> Iterator[Decoding[list[int]]]:
    """Answer sixteen requests at a time, without end."""
    decoding = make_decoding(model, max_rows=16)
    scheduler, is_over = Scheduler("benchmark", decoding, make_line, turn), threading.Event()

    def answer(ask: Ask) -> None:
        while not is_over.is_set():
            scheduler.submit(Job(id="answer"), [ask]).wait()

    threads = [threading.Thread(target=answer, args=(ask,)) for ask in make_asks(16, seed=8)]
    for thread in threads:
        thread.start()
    yield decoding
    is_over.set()
    for thread in threads:
        thread.join()


def resident_bytes() -> int:
    """Return this process's resident memory."""
    with open("/proc/self/statm") as file:  # noqa: PTH123  a path object adds nothing here
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
