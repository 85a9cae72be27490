"""The main job from end to end: a stack of its own, a corpus embedded and searched, questions answered."""

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np

from penstock.client import AsyncClient
from penstock.conversation import Message
from penstock.errors import PenstockError, WorkerError
from penstock.result import Vectors
from penstock_workers.command.stack import WORKERS_STAGE, Stack, plan_stack
from penstock_workers.command.status import judge
from penstock_workers.command.supervisor import StackEndedError, Supervisor
from penstock_workers.configuration import Loaded

READY_WITHIN_S: Final = 600.0
MAX_CHARACTERS: Final = 600
N_SHOWN: Final = 2
EMBEDDER, CHAT = "minilm", "chat"

QUESTIONS: Final = (
    "What happens to a job when its worker is killed?",
    "How do I choose how many worker processes run?",
    "How do vectors travel back to the caller?",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """What the chat model is asked."""

    system_prompt: str | None
    history: tuple[Message, ...]
    prompt: str


DIALOGUES: Final = (
    Dialogue(
        system_prompt="Answer in upper case.",
        history=(
            Message(role="user", content="My name is Zorblat."),
            Message(role="assistant", content="NICE TO MEET YOU, ZORBLAT."),
            Message(role="user", content="The pump is red. The gate is blue. What colour is the gate?"),
            Message(role="assistant", content="THE GATE IS BLUE."),
        ),
        prompt="What is my name?",
    ),
    Dialogue(
        system_prompt="The pump is red. The gate is blue. The valve is green.",
        history=(),
        prompt="What colour is the gate?",
    ),
    Dialogue(
        system_prompt="End every answer with OVER.",
        history=(),
        prompt="Give me a JSON object with name Ada and age 36.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A piece of a document."""

    file: str
    text: str


def run_demo(
    loaded: Loaded, config: Path | None, environment: dict[str, str], *, corpus: Path, as_json: bool
) -> int:
    """Run the demo; returns the exit code.

    Args:
        loaded: the configuration; needs the models `minilm` and `chat`.
        config: its file, for the workers.
        environment: variables for the workers, on top of ours.
        corpus: folder whose Markdown files are searched.
        as_json: print one JSON object and nothing else on standard output.
    """
    log: list[str] = []
    say: Callable[[str], None] = (lambda _: None) if as_json else _say
    own = Loaded(loaded.settings, {key: o for key, o in loaded.origins.items() if key != "redis.broker_url"})
    stack = plan_stack(own, config=config, environment=environment, redis_folder=None, with_flower=False)
    try:
        supervisor = Supervisor(stack.children, drain_s=10, write=log.append)
        report = asyncio.run(_in_stack(supervisor, loaded, stack, corpus, say))
    except (PenstockError, StackEndedError) as error:
        sys.stderr.write("\n".join([*log[-40:], f"demo ended: {error}", ""]))
        return 1
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0


async def _in_stack(
    supervisor: Supervisor, loaded: Loaded, stack: Stack, corpus: Path, say: Callable[[str], None]
) -> dict[str, object]:
    n_workers = sum(child.stage == WORKERS_STAGE for child in stack.children)
    say(f"starting Redis and {n_workers} worker processes ...")
    started = time.perf_counter()
    async with supervisor.running(), AsyncClient(stack.login_url) as client:
        await _wait_until_ready(client, tuple(loaded.settings.models), n_workers)
        ready_s = time.perf_counter() - started
        say(f"ready after {ready_s:.1f} s: {', '.join(loaded.settings.models)}\n")
        search = await _search(client, passages(corpus), say)
        answers = await _answer(client, say)
        say("\nstopping ...")
    say("done")
    return {"n_workers": n_workers, "ready_s": round(ready_s, 2), **search, "answers": answers}


async def _wait_until_ready(client: AsyncClient, models: Sequence[str], n_workers: int) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        status = judge(await client.registry(), tuple(models))
        if status.is_ready and sum(line.is_ready for line in status.workers) >= n_workers:
            return
        if time.monotonic() > deadline:
            raise WorkerError("; ".join(status.lines()))
        await asyncio.sleep(0.2)


async def _search(
    client: AsyncClient, corpus: Sequence[Passage], say: Callable[[str], None]
) -> dict[str, object]:
    texts = [passage.text for passage in corpus]
    say(f"embedding {len(texts)} passages of {len({p.file for p in corpus})} documents ...")
    began = time.perf_counter()
    parts: list[Vectors] = []
    async for vectors in client.embed_many(texts, model=EMBEDDER, progress=True):
        parts.append(vectors)
    index = np.concatenate(parts)  # (n_passages, dim)
    seconds = time.perf_counter() - began
    say(f"{len(texts)} texts in {seconds:.2f} s: {len(texts) / seconds:.0f} texts/s, array {index.shape}\n")
    found = []
    for question in QUESTIONS:
        job = await client.submit_embed([question], model=EMBEDDER)
        scores = index @ (await job.result())[0]
        best = np.argsort(-scores)[:N_SHOWN]
        say(f"? {question}")
        for i in best:
            say(f"  {scores[i]:.2f}  {corpus[i].file}: {_shorten(corpus[i].text)}")
        hits = [{"score": float(scores[i]), **asdict(corpus[i])} for i in best]
        timings = asdict(job.timings) if job.timings else None
        found.append({"question": question, "passages": hits, "timings": timings})
    return {
        "n_passages": len(texts),
        "dim": index.shape[1],
        "embed_s": round(seconds, 3),
        "texts_per_s": round(len(texts) / seconds, 1),
        "questions": found,
    }


async def _answer(client: AsyncClient, say: Callable[[str], None]) -> list[dict[str, object]]:
    say("")
    jobs = [
        await client.submit_generate(
            dialogue.prompt, model=CHAT, system_prompt=dialogue.system_prompt, history=dialogue.history
        )
        for dialogue in DIALOGUES
    ]
    answers: list[dict[str, object]] = []
    for dialogue, job in zip(DIALOGUES, jobs, strict=True):
        answer = await job.result()
        if dialogue.system_prompt:
            say(f"system:    {dialogue.system_prompt}")
        for turn in (*dialogue.history, Message(role="user", content=dialogue.prompt)):
            say(f"{turn.role + ':':10} {turn.content}")
        took = answer.timings
        say(f"answer:    {answer.text}")
        say(
            f"           {answer.usage.prompt_tokens} + {answer.usage.completion_tokens} tokens, "
            f"{answer.finish_reason}; queued {took.queued_s * 1e3:.0f} ms, "
            f"batched {took.batched_s * 1e3:.0f} ms, computed {took.computed_s * 1e3:.0f} ms"
        )
        turns = [turn.model_dump() for turn in dialogue.history]
        asked = {"system_prompt": dialogue.system_prompt, "history": turns, "prompt": dialogue.prompt}
        answers.append({**asked, "answer": asdict(answer)})
    return answers


def passages(folder: Path) -> list[Passage]:
    """Cut a folder's Markdown files into passages.

    Raises:
        WorkerError: there are none.
    """
    found = [
        Passage(file=str(path.relative_to(folder)), text=text)
        for path in sorted(folder.rglob("*.md"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        for text in cut_markdown(path.read_text(encoding="utf-8"))
    ]
    if not found:
        raise WorkerError(f"no Markdown files in {folder.resolve()}")
    return found


def cut_markdown(markdown: str) -> Iterator[str]:
    """Yield passages of at most `MAX_CHARACTERS`, each with the heading it stands under."""
    heading = ""
    for block in re.split(r"\n\s*\n|\n(?=[-|] )|\n(?=#)", markdown):
        if block.startswith("#"):
            heading, _, block = block.lstrip("# ").partition("\n")
        plain = " ".join(block.strip("|-` \n").split())
        if len(plain) < 30 or set(plain) <= set("-| :"):
            continue
        for start in range(0, len(plain), MAX_CHARACTERS):
            yield f"{heading}: {plain[start : start + MAX_CHARACTERS]}"


def _shorten(text: str) -> str:
    return text if len(text) <= 110 else text[:107] + "..."


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
