"""Continuous batching: jobs join and leave between steps, whatever becomes of the others."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from penstock.errors import DeadlineExceededError, EngineError, JobCancelledError, PenstockError
from penstock_workers.batching.feed import Job, RequeueError
from penstock_workers.batching.scheduler import Scheduler
from tests.eventually import eventually


@dataclass
class Word:
    """An item whose answer grows by a letter at each step."""

    text: str

    @property
    def n_tokens(self) -> int:
        """Return its length."""
        return len(self.text)


@dataclass(eq=False)
class Spelling:
    """A sequence of the fake model."""

    word: Word
    is_over: Callable[[], bool]
    on_start: Callable[[], None]
    on_piece: Callable[[str], None] | None
    said: str = ""


def spell(
    word: Word,
    /,
    *,
    is_over: Callable[[], bool],
    on_start: Callable[[], None],
    on_piece: Callable[[str], None] | None,
) -> Spelling:
    """Make a sequence."""
    return Spelling(word, is_over, on_start, on_piece)


@dataclass
class FakeSteps:
    """Upper case, a letter per step; `gate` holds a step back, a word with `!` fails, `death` ends it all."""

    places: int = 2
    n_tokens: int = 0
    sequences: list[Spelling] = field(default_factory=list)
    waiting: list[Spelling] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    death: BaseException | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nobody is there."""
        return not self.sequences and not self.waiting

    def add(self, sequence: Spelling, /) -> None:
        """Let a sequence wait."""
        self.waiting.append(sequence)

    def sweep(self) -> None:
        """Forget who is over."""
        self.waiting = [sequence for sequence in self.waiting if not sequence.is_over()]

    def step(self) -> list[tuple[Spelling, str | PenstockError]]:
        """Say a letter of each word."""
        assert self.gate.wait(30)
        if self.death:
            raise self.death
        self.sequences = [sequence for sequence in self.sequences if not sequence.is_over()]
        while self.waiting and len(self.sequences) < self.places:
            if not (sequence := self.waiting.pop(0)).is_over():
                sequence.on_start()
                self.sequences.append(sequence)
        ended: list[tuple[Spelling, str | PenstockError]] = []
        for sequence in self.sequences:
            letter = sequence.word.text[len(sequence.said)].upper()
            sequence.said += letter
            self.n_tokens += 1
            if sequence.on_piece:
                sequence.on_piece(letter)
            if letter == "!":
                ended.append((sequence, EngineError("fake", "a bad word")))
            elif len(sequence.said) == len(sequence.word.text):
                ended.append((sequence, sequence.said))
        self.sequences = [
            sequence for sequence in self.sequences if sequence not in [one for one, _ in ended]
        ]
        return ended


@pytest.fixture
def steps() -> Iterator[FakeSteps]:
    """A fake model with two places, let go in the end."""
    fake = FakeSteps()
    yield fake
    fake.gate.set()


@pytest.fixture
def scheduler(steps: FakeSteps) -> Scheduler[Word, Spelling, str]:
    """A scheduler of that model."""
    return Scheduler("fake", steps, spell)


def words(text: str) -> list[Word]:
    return [Word(word) for word in text.split()]


def test_answers_keep_the_order_of_items(steps: FakeSteps, scheduler: Scheduler[Word, Spelling, str]) -> None:
    """A job gets the answers in the order of its items, whichever ended first, and its speed is measured."""
    steps.gate.set()

    assert scheduler.submit(Job(id="job"), words("longest a mid")).wait() == ["LONGEST", "A", "MID"]
    assert scheduler.submit(Job(id="empty"), []).wait() == []
    assert (scheduler.tokens_per_s or 0) > 0


def test_jobs_join_while_others_run(steps: FakeSteps, scheduler: Scheduler[Word, Spelling, str]) -> None:
    """A short job that comes later is answered before a long one ends."""
    is_cancelled = threading.Event()
    long = scheduler.submit(Job(id="long", is_unwanted=is_cancelled.is_set), words("x" * 50_000))
    steps.gate.set()
    assert eventually(lambda: steps.n_tokens > 10)

    assert scheduler.submit(Job(id="short"), words("ab")).wait() == ["AB"]

    assert not long.is_over
    is_cancelled.set()


def test_bad_item_fails_its_job_alone(steps: FakeSteps, scheduler: Scheduler[Word, Spelling, str]) -> None:
    """The job of an item that fails gets its error; the others get their answers."""
    bad = scheduler.submit(Job(id="bad"), words("a b! c"))
    good = scheduler.submit(Job(id="good"), words("abc de"))
    steps.gate.set()

    with pytest.raises(EngineError, match="a bad word"):
        bad.wait()
    assert good.wait() == ["ABC", "DE"]


def test_cancelled_job_gives_its_places_away(
    steps: FakeSteps, scheduler: Scheduler[Word, Spelling, str]
) -> None:
    """A cancelled job ends at once, running or waiting, and the next one has its place."""
    is_cancelled = threading.Event()
    running = scheduler.submit(Job(id="running", is_unwanted=is_cancelled.is_set), [Word("x" * 10**6)] * 2)
    waiting = scheduler.submit(Job(id="waiting"), words("y"))
    steps.gate.set()
    assert eventually(lambda: steps.n_tokens > 10)
    assert not waiting.is_over

    is_cancelled.set()

    with pytest.raises(JobCancelledError):
        running.wait()
    assert waiting.wait() == ["Y"]


def test_late_jobs_leave(steps: FakeSteps, scheduler: Scheduler[Word, Spelling, str]) -> None:
    """A job past its deadline leaves the batch, or is never admitted to it."""
    steps.gate.set()
    running = scheduler.submit(Job(id="running", deadline=time.time() + 0.3), [Word("x" * 10**7)])
    late = scheduler.submit(Job(id="late", deadline=time.time() - 5), words("y"))

    for work in (late, running):
        with pytest.raises(DeadlineExceededError):
            work.wait()
    assert scheduler.submit(Job(id="next", deadline=time.time() + 60), words("z")).wait() == ["Z"]


def test_pieces_reach_their_listener(steps: FakeSteps, scheduler: Scheduler[Word, Spelling, str]) -> None:
    """A listener hears of each item's text piece by piece."""
    heard: list[tuple[int, str]] = []
    work = scheduler.submit(
        Job(id="job"), words("ab c"), listen=lambda index, piece: heard.append((index, piece))
    )
    steps.gate.set()

    work.wait()

    assert sorted(heard) == [(0, "A"), (0, "B"), (1, "C")]


def test_dead_thread_requeues_what_it_did_not_touch(
    steps: FakeSteps, scheduler: Scheduler[Word, Spelling, str]
) -> None:
    """What ran may be why it died, and is left to its lease; the process is told to end."""
    running = scheduler.submit(Job(id="running"), [Word("x" * 10**7)] * 2)
    steps.gate.set()
    eventually(lambda: running.is_started)
    waiting = scheduler.submit(Job(id="waiting"), words("y"))
    assert not scheduler.is_stalled(60)

    steps.death = MemoryError("gone")

    eventually(lambda: scheduler.is_stalled(60))
    with pytest.raises(RequeueError, match="model thread of fake has ended"):
        waiting.wait()
    assert not running.is_over
    assert not scheduler.submit(Job(id="later"), words("d")).is_over


def test_hanging_step_is_a_stall(steps: FakeSteps, scheduler: Scheduler[Word, Spelling, str]) -> None:
    """A step without end counts as hung after the limit; an idle thread never does."""
    assert not scheduler.is_stalled(0.0)
    work = scheduler.submit(Job(id="job"), words("a"))
    assert eventually(lambda: scheduler.is_stalled(0.05))

    steps.gate.set()
    work.wait()

    assert eventually(lambda: not scheduler.is_stalled(0.0))
