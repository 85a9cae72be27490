import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.errors import (
    DeadlineExceededError,
    EngineError,
    JobCancelledError,
    OutOfMemoryError,
    PenstockError,
)
from penstock.request import Priority
from penstock_workers.batching.batcher import WINDOW_ITEMS, Batcher
from penstock_workers.batching.cuts import ATTENTION_BYTES, PADDING_TOKENS, cut_by_tokens
from penstock_workers.batching.feed import Job, RequeueError
from penstock_workers.batching.rate import Speed
from penstock_workers.batching.work import Work
from tests.eventually import eventually

HELD_S = 5.0  # a test that forgets to release its model fails after this


@dataclass(frozen=True)
class Text:
    """An item; its answer is its text in upper case."""

    text: str
    n_tokens: int = 1


class FakeModel:
    """Answers in upper case; can be held in the middle of a batch, and fails as it is told."""

    def __init__(self, fails: Callable[[Sequence[Text]], BaseException | None] = lambda _: None) -> None:
        self.batches: list[list[str]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self._fails = fails

    def run(self, items: Sequence[Text]) -> Iterator[tuple[int, str | PenstockError] | None]:
        """See `penstock_workers.batching.feed.Run`; the answers come last first."""
        self.batches.append([item.text for item in items])
        self.go_on.wait(HELD_S)
        if (error := self._fails(items)) is not None:
            raise error
        for index in reversed(range(len(items))):
            yield index, items[index].text.upper()

    def hold(self) -> None:
        """Stop in the next batch until `go_on` is set."""
        self.go_on.clear()


def texts(words: str, n_tokens: int = 1) -> list[Text]:
    """Return an item per word."""
    return [Text(word, n_tokens) for word in words.split()]


def answers(work: Work[Text, str]) -> list[str]:
    """Return a job's answers, or raise its error, within a second or five."""
    eventually(lambda: work.is_over)
    return work.wait()


def start(model: FakeModel, *, max_items: int = 64) -> Batcher[Text, str]:
    """Return a batcher of that model."""
    return Batcher("fake", model.run, cut_by_tokens(max_items, is_padded=False))


def start_busy(model: FakeModel, *, max_items: int = 64) -> tuple[Batcher[Text, str], Work[Text, str]]:
    """Return a batcher whose model is held in a first batch, and that batch's job."""
    model.hold()
    batcher = start(model, max_items=max_items)
    first = batcher.submit(Job(id="first"), texts("first"))
    eventually(lambda: model.batches)
    return batcher, first


# Cutting


def random_lengths(rng: random.Random) -> NDArray[np.int64]:
    """Return up to 40 lengths, the first job's longest first."""
    return np.array([rng.randint(1, 300) for _ in range(rng.randint(1, 40))])


def test_padded_batches_hold_the_most_urgent_and_fit_and_are_alike() -> None:
    """The first item always goes; the batch keeps its budget; no item outside is between those inside."""
    rng = random.Random(5)
    for _ in range(500):
        lengths, max_tokens = random_lengths(rng), rng.randint(1, 2000)

        chosen = cut_by_tokens(max_tokens)(lengths, math.inf)

        inside = [lengths[i] for i in chosen]
        outside = [length for i, length in enumerate(lengths) if i not in set(chosen)]
        assert 0 in chosen
        assert len(set(chosen)) == len(chosen)
        assert len(chosen) == 1 or max(inside) * len(inside) <= max_tokens
        assert max(inside) <= max(2 * min(inside), min(inside) + PADDING_TOKENS)
        assert not any(min(inside) < length < max(inside) for length in outside)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "chosen"),
    [
        ([5], 1, {0}),
        ([500, 1, 1, 1], 100, {0}),
        ([1, 500, 500], 100, {0}),
        ([10, 10, 10, 10], 30, {0, 1, 2}),
        ([10, 3, 10, 3], 20, {0, 2}),
        ([2, 90, 2, 90, 2], 8, {0, 2, 4}),
        ([50, 49, 51, 1], 160, {0, 1, 2}),
        ([8, 512, 8, 8], 10_000, {0, 2, 3}),
        ([512, 8, 8, 300], 10_000, {0, 3}),
        ([16, 2, 30], 10_000, {0, 2}),
        ([100, 60, 100, 60, 100, 60], 1024, {0, 2, 4}),
    ],
)
def test_padded_batches(lengths: list[int], max_tokens: int, chosen: set[int]) -> None:
    """Texts that would make others pay for padding go in another batch."""
    assert set(cut_by_tokens(max_tokens)(np.array(lengths), math.inf)) == chosen


def test_attention_that_would_not_fit_makes_padded_batches_smaller() -> None:
    """With heads to count, many long texts are cut by texts times heads times the square of the longest."""
    lengths = np.full(64, 1024)

    chosen = cut_by_tokens(1 << 20, n_heads=16)(lengths, math.inf)

    assert len(chosen) == ATTENTION_BYTES // (4 * 16 * 1024 * 1024)
    assert len(cut_by_tokens(1 << 20)(lengths, math.inf)) == 64


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "chosen"),
    [
        ([500, 1, 1], 100, [0]),
        ([60, 50, 40, 1], 100, [0, 2]),
        ([512, 8, 8], 1024, [0, 1, 2]),
        ([8, 8, 512, 8, 60], 1024, [0, 1, 3, 4]),
        ([200, 8, 200], 1024, [0, 1, 2]),
    ],
)
def test_packed_batches(lengths: list[int], max_tokens: int, chosen: list[int]) -> None:
    """The most urgent go, whatever their length; one that would take longer than all before it waits."""
    assert cut_by_tokens(max_tokens, is_padded=False)(np.array(lengths), math.inf) == chosen


@pytest.mark.parametrize("is_padded", [True, False])
def test_a_limit_from_outside_lowers_the_own(is_padded: bool) -> None:
    """The batcher can ask for less than a cut would take, never for more."""
    cut = cut_by_tokens(100, is_padded=is_padded)
    lengths = np.full(50, 10)

    assert [len(cut(lengths, limit)) for limit in (20, 100, 1000)] == [2, 10, 10]


# Answering


def test_job_is_answered_as_a_whole_and_in_order() -> None:
    """Answers come in the order of the items, whatever order the model gave them in."""
    batcher = start(FakeModel())

    assert answers(batcher.submit(Job(id="job"), texts("a b c d"))) == ["A", "B", "C", "D"]


def test_job_larger_than_a_batch_is_answered_as_a_whole() -> None:
    """A job goes through in several batches; its caller sees one answer."""
    model = FakeModel()
    batcher = start(model, max_items=2)

    work = batcher.submit(Job(id="job"), texts("a b c d e"))

    assert answers(work) == ["A", "B", "C", "D", "E"]
    assert model.batches == [["a", "b"], ["c", "d"], ["e"]]


def test_items_of_waiting_jobs_share_a_batch() -> None:
    """What piles up while the model is busy is computed together."""
    model = FakeModel()
    batcher, first = start_busy(model)
    jobs = [batcher.submit(Job(id=f"job-{n}"), texts(f"a{n} b{n}")) for n in range(3)]

    model.go_on.set()

    assert answers(first) == ["FIRST"]
    assert [answers(job) for job in jobs] == [["A0", "B0"], ["A1", "B1"], ["A2", "B2"]]
    assert model.batches == [["first"], ["a0", "b0", "a1", "b1", "a2", "b2"]]


def test_idle_model_starts_at_once() -> None:
    """A single item does not wait for batch mates."""
    model = FakeModel()
    batcher = start(model)

    for word in ("a", "b"):
        assert answers(batcher.submit(Job(id=word), texts(word))) == [word.upper()]

    assert model.batches == [["a"], ["b"]]


def test_every_item_is_computed_once() -> None:
    """Jobs of any size and length, from many threads, are all answered, each item by one batch."""
    rng = random.Random(7)
    model = FakeModel()
    batcher: Batcher[Text, str] = Batcher("fake", model.run, cut_by_tokens(400))
    jobs: dict[str, list[Text]] = {
        f"{n}": [Text(f"{n}-{i}", rng.randint(1, 500)) for i in range(rng.randint(0, 2 * WINDOW_ITEMS // 30))]
        for n in range(60)
    }
    works: dict[str, Work[Text, str]] = {}

    def submit(names: list[str]) -> None:
        for name in names:
            works[name] = batcher.submit(Job(id=name), jobs[name])

    senders = [threading.Thread(target=submit, args=([*jobs][n::3],)) for n in range(3)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()

    for name, items in jobs.items():
        assert answers(works[name]) == [item.text.upper() for item in items]
    computed = [text for batch in model.batches for text in batch]
    assert sorted(computed) == sorted(item.text for items in jobs.values() for item in items)


def test_window_is_the_oldest_items() -> None:
    """With more waiting than the window holds, the oldest of them still goes into the next batch."""
    model = FakeModel()
    model.hold()
    batcher: Batcher[Text, str] = Batcher("fake", model.run, cut_by_tokens(10_000))
    first = batcher.submit(Job(id="first"), [Text("first", 1)])
    eventually(lambda: model.batches)
    long = batcher.submit(Job(id="long"), [Text("long", 9_999)])
    short = batcher.submit(Job(id="short"), [Text(f"s{n}", 1) for n in range(2 * WINDOW_ITEMS)])

    model.go_on.set()

    assert answers(long) == ["LONG"]
    assert len(answers(short)) == 2 * WINDOW_ITEMS
    assert model.batches[1] == ["long"]
    assert answers(first) == ["FIRST"]


def test_empty_job_is_answered_at_once() -> None:
    """A job without texts needs no model, not even a free one."""
    model = FakeModel()
    batcher, _ = start_busy(model)

    assert batcher.submit(Job(id="empty"), []).wait() == []

    model.go_on.set()
    assert model.batches == [["first"]]


def test_work_tells_its_times() -> None:
    """Waiting for a batch and computing are told apart."""
    model = FakeModel()
    batcher, first = start_busy(model)
    second = batcher.submit(Job(id="second"), texts("second"))
    held = time.perf_counter()
    eventually(lambda: time.perf_counter() - held > 0.1)

    model.go_on.set()

    assert answers(second) == ["SECOND"]
    assert second.batched_s >= 0.1 > second.computed_s >= 0
    assert first.computed_s >= 0.1
    assert (eventually(lambda: batcher.tokens_per_s) or 0) > 0


def test_speed_is_unknown_before_the_first_batch() -> None:
    """No figure is made up."""
    assert start(FakeModel()).tokens_per_s is None


def test_what_was_measured_at_load_is_the_speed() -> None:
    """Callers cut their first jobs by it, and the worker holds as many."""
    cut = cut_by_tokens(64, is_padded=False)

    batcher = Batcher("fake", FakeModel().run, cut, measured=(1000, 0.5))

    assert batcher.tokens_per_s == pytest.approx(2000)


# Failing


def fails_on(word: str, error: BaseException) -> Callable[[Sequence[Text]], BaseException | None]:
    """Fail every batch that holds `word`."""
    return lambda items: error if any(item.text == word for item in items) else None


def test_failing_item_fails_its_job_only() -> None:
    """The item that fails is found by halving; jobs that shared its batch get their answers."""
    model = FakeModel(fails_on("bad", ValueError("bad words")))
    batcher, _ = start_busy(model)
    before = batcher.submit(Job(id="before"), texts("a b c"))
    failing = batcher.submit(Job(id="failing"), texts("d bad e"))
    after = batcher.submit(Job(id="after"), texts("f g"))

    model.go_on.set()

    assert answers(before) == ["A", "B", "C"]
    assert answers(after) == ["F", "G"]
    with pytest.raises(EngineError) as caught:
        answers(failing)
    assert str(caught.value) == "fake failed: ValueError in its forward pass"  # not the error's own text
    assert answers(batcher.submit(Job(id="next"), texts("h"))) == ["H"]


def test_error_of_ours_reaches_the_caller_unchanged() -> None:
    """An engine that knows what is wrong says it in its own words."""
    model = FakeModel(fails_on("bad", OutOfMemoryError("fake", 9)))
    batcher = start(model)

    with pytest.raises(OutOfMemoryError, match="9 tokens"):
        answers(batcher.submit(Job(id="job"), texts("bad")))


def test_error_as_an_answer_fails_its_job_only() -> None:
    """A model can fail one item of a batch and answer the others, without computing twice."""
    batches = []

    def run(items: Sequence[Text]) -> Iterator[tuple[int, str | PenstockError] | None]:
        batches.append(len(items))
        for index, item in enumerate(items):
            yield index, EngineError("fake", "no number") if item.text == "bad" else item.text

    batcher: Batcher[Text, str] = Batcher("fake", run, cut_by_tokens(8, is_padded=False))
    failing = batcher.submit(Job(id="failing"), texts("bad a bad b"))

    with pytest.raises(EngineError, match="no number"):
        answers(failing)
    assert answers(batcher.submit(Job(id="next"), texts("c"))) == ["c"]
    assert batches[0] == 4


def test_batch_that_does_not_fit_is_halved() -> None:
    """Out of memory in a large batch costs time, not jobs."""
    model = FakeModel(lambda items: RuntimeError("out of memory") if len(items) > 2 else None)
    batcher, _ = start_busy(model)
    jobs = [batcher.submit(Job(id=f"{n}"), texts(f"a{n} b{n}")) for n in range(4)]

    model.go_on.set()

    assert [answers(job) for job in jobs] == [[f"A{n}", f"B{n}"] for n in range(4)]
    assert [len(batch) for batch in model.batches] == [1, 8, 4, 2, 2, 4, 2, 2]


def test_answers_given_before_a_failure_stand() -> None:
    """Only what a failed batch left open is computed again."""
    runs: list[list[str]] = []

    def run(items: Sequence[Text]) -> Iterator[tuple[int, str | PenstockError] | None]:
        runs.append([item.text for item in items])
        for index, item in enumerate(items):
            if item.text == "c" and len(runs) == 1:
                raise RuntimeError("once")
            yield index, item.text.upper()

    batcher: Batcher[Text, str] = Batcher("fake", run, cut_by_tokens(8, is_padded=False))

    assert answers(batcher.submit(Job(id="job"), texts("a b c d"))) == ["A", "B", "C", "D"]
    assert runs == [["a", "b", "c", "d"], ["c"], ["d"]]


def test_halving_stops_for_a_job_that_has_failed() -> None:
    """One failed item answers for its job; no more of the job is computed, and the next one is."""
    model = FakeModel(lambda items: None if items[0].text == "next" else ValueError())
    batcher = start(model)

    with pytest.raises(EngineError):
        answers(batcher.submit(Job(id="failing"), texts("a b c d e f g h")))

    assert answers(batcher.submit(Job(id="next"), texts("next"))) == ["NEXT"]
    assert model.batches == [[*"abcdefgh"], [*"abcd"], [*"ab"], ["a"], ["next"]]


def test_item_without_an_answer_fails_its_job_only() -> None:
    """A model that forgets an item leaves nobody waiting; jobs that got their answers keep them."""
    held = threading.Event()

    def run(items: Sequence[Text]) -> Iterator[tuple[int, str | PenstockError] | None]:
        held.wait(HELD_S)
        for index, item in enumerate(items):
            if item.text != "forgotten":
                yield index, item.text.upper()

    batcher: Batcher[Text, str] = Batcher("fake", run, cut_by_tokens(8, is_padded=False))
    works = [batcher.submit(Job(id=words), texts(words)) for words in ("a", "b forgotten", "c d")]

    held.set()

    assert answers(works[0]) == ["A"]
    assert answers(works[2]) == ["C", "D"]
    with pytest.raises(EngineError, match="fake failed: it gave no answer for an item"):
        answers(works[1])


@pytest.mark.parametrize("death", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_dead_model_thread_requeues_what_it_did_not_touch(death: BaseException) -> None:
    """Waiting jobs go back to their queue; those of the batch, which may be why, are left to their leases."""
    model = FakeModel(lambda _: death)
    batcher, first = start_busy(model, max_items=1)
    waiting = [batcher.submit(Job(id=f"{n}"), texts("a b")) for n in range(3)]
    assert not batcher.is_stalled(60)

    model.go_on.set()

    for work in waiting:
        with pytest.raises(RequeueError):
            answers(work)
    later = batcher.submit(Job(id="later"), texts("c"))
    assert batcher.is_stalled(60)
    assert not first.is_over
    assert not later.is_over
    assert model.batches == [["first"]]


def test_lack_of_memory_is_learned_from_and_forgotten_slowly() -> None:
    """After a batch that did not fit, batches are smaller from the start, and grow again while they fit."""
    model = FakeModel(lambda items: OutOfMemoryError("fake", 10) if len(items) > 40 else None)
    batcher: Batcher[Text, str] = Batcher("fake", model.run, cut_by_tokens(640))

    assert len(answers(batcher.submit(Job(id="first"), texts("a " * 64, 10)))) == 64
    assert len(answers(batcher.submit(Job(id="second"), texts("b " * 2000, 10)))) == 2000

    sizes = [len(batch) for batch in model.batches]
    assert sizes[:4] == [64, 32, 32, 32]
    assert 34 < max(sizes[4:]) <= 41


# Urgency


def test_urgent_jobs_go_first() -> None:
    """Deadline, priority, age and size decide together: whoever is due first."""
    model = FakeModel()
    batcher, _ = start_busy(model, max_items=1)
    eventually(lambda: model.batches)
    now = time.time()
    jobs = [
        batcher.submit(Job(id="batch", priority=Priority.BATCH), texts("batch")),
        batcher.submit(Job(id="default"), texts("default")),
        batcher.submit(Job(id="soon", deadline=now + 20), texts("soon")),
        batcher.submit(Job(id="interactive", priority=Priority.INTERACTIVE), texts("interactive")),
        batcher.submit(Job(id="at once", deadline=now + 0.9), texts("now")),
    ]

    model.go_on.set()

    for job in jobs:
        answers(job)
    assert [batch[0] for batch in model.batches] == [
        "first",
        "now",
        "interactive",
        "soon",
        "default",
        "batch",
    ]


def test_less_urgent_jobs_have_one_token_of_eight() -> None:
    """However many urgent jobs pass it, a job has its turn after eight times its own tokens."""
    model = FakeModel()
    batcher, first = start_busy(model, max_items=100)
    works = [
        first,
        *(batcher.submit(Job(id="batch", priority=Priority.BATCH), texts("batch", 100)) for _ in range(3)),
        *(
            batcher.submit(Job(id="i", priority=Priority.INTERACTIVE), texts("urgent", 100))
            for _ in range(120)
        ),
    ]
    model.go_on.set()
    for work in works:
        answers(work)

    places = [place for place, batch in enumerate(model.batches) if batch == ["batch"]]
    assert places == [9, 18, 27]


@pytest.mark.parametrize(
    ("priority", "order"), [(Priority.DEFAULT, ["small", "bulk"]), (Priority.BATCH, ["bulk", "small"])]
)
def test_small_jobs_are_not_stuck_behind_a_bulk_load(priority: Priority, order: list[str]) -> None:
    """Once the speed is known, a job that computes for long lets later small ones pass, but not bulk ones."""
    model = FakeModel()
    batcher = start(model, max_items=1)
    answers(batcher.submit(Job(id="measure"), [Text("measure", 10)]))
    model.hold()
    held = batcher.submit(Job(id="held"), texts("held"))
    eventually(lambda: len(model.batches) == 2)
    bulk = batcher.submit(Job(id="bulk", priority=priority), [Text("bulk", 1 << 40)])
    small = batcher.submit(Job(id="small", priority=priority), texts("small"))

    model.go_on.set()

    for job in (held, bulk, small):
        answers(job)
    assert model.batches[2:] == [[name] for name in order]


def test_cancelled_job_costs_no_forward_pass() -> None:
    """What it has waiting is dropped, and its place goes to the next."""
    model = FakeModel()
    batcher, first = start_busy(model, max_items=2)
    is_cancelled = threading.Event()
    cancelled = batcher.submit(Job(id="cancelled", is_unwanted=is_cancelled.is_set), texts("a b c d"))
    kept = batcher.submit(Job(id="kept"), texts("e"))
    is_cancelled.set()

    model.go_on.set()

    assert answers(first) == ["FIRST"]
    assert answers(kept) == ["E"]
    with pytest.raises(JobCancelledError):
        answers(cancelled)
    assert model.batches == [["first"], ["e"]]


# Deadlines


def test_job_whose_deadline_passed_is_not_computed() -> None:
    """A job nobody wants any more costs no forward pass."""
    model = FakeModel()
    batcher, _ = start_busy(model)
    deadline = time.time() + 0.02
    late = batcher.submit(Job(id="late", deadline=deadline), texts("a b"))
    in_time = batcher.submit(Job(id="in time", deadline=deadline + 3600), texts("c"))
    eventually(lambda: time.time() > deadline)

    model.go_on.set()

    with pytest.raises(DeadlineExceededError) as caught:
        answers(late)
    assert caught.value.job_id == "late"
    assert caught.value.late_s > 0
    assert answers(in_time) == ["C"]
    assert model.batches == [["first"], ["c"]]


def test_job_that_cannot_be_in_time_makes_room_for_others() -> None:
    """By the measured speed: what would be late is told so, and others are computed in its place."""
    model = FakeModel()
    batcher, first = start_busy(model)
    time.sleep(0.05)  # a token took so long
    model.go_on.set()
    answers(first)
    eventually(lambda: batcher.tokens_per_s is not None)
    model.hold()
    batcher.submit(Job(id="busy"), texts("x"))
    eventually(lambda: len(model.batches) == 2)
    large = batcher.submit(Job(id="large", deadline=time.time() + 600), texts("y", 100_000))
    small = batcher.submit(Job(id="small", deadline=time.time() + 3600), texts("z"))

    model.go_on.set()

    with pytest.raises(DeadlineExceededError, match="large is late for its deadline"):
        answers(large)
    assert answers(small) == ["Z"]
    assert ["y"] not in model.batches


def test_batches_are_short_after_an_interactive_job() -> None:
    """The next one may come at any moment, and is not to wait for a full batch of others."""
    model = FakeModel(lambda items: time.sleep(sum(item.n_tokens for item in items) / 10_000))
    batcher = start(model, max_items=10_000)
    answers(batcher.submit(Job(id="bulk"), texts("b " * 20, 60)))
    answers(batcher.submit(Job(id="query", priority=Priority.INTERACTIVE), texts("q", 8)))
    n_before = len(model.batches)
    answers(batcher.submit(Job(id="bulk"), texts("b " * 5, 60)))

    assert model.batches[0] == ["b"] * 20
    assert [len(batch) for batch in model.batches[n_before:]] == [2, 2, 1]


def test_a_wrong_speed_ends_with_the_next_batch() -> None:
    """Where no job can be in time by the measured speed one is tried, and the speed measured anew."""
    model = FakeModel()
    batcher, first = start_busy(model)
    time.sleep(0.05)
    model.go_on.set()
    answers(first)
    eventually(lambda: batcher.tokens_per_s is not None)

    assert answers(batcher.submit(Job(id="large", deadline=time.time() + 600), texts("y", 100_000))) == ["Y"]


def test_speed_tells_full_batches_from_small_ones() -> None:
    """A fixed part and a part for each token are found, also while most batches are of one short text."""
    speed = Speed()
    for n_tokens in [1024, 900, 700, *[10] * 60]:
        speed.count(n_tokens, 0.004 + n_tokens / 15_000)

    assert speed.seconds(1024) == pytest.approx(0.004 + 1024 / 15_000, rel=0.1)
    assert speed.tokens_per_s == pytest.approx(14_000, rel=0.25)


def test_speed_of_batches_that_are_alike_is_their_ratio() -> None:
    """Noise of equal batches is not taken for what tokens cost."""
    speed, rng = Speed(), random.Random(1)
    assert speed.tokens_per_s is None
    for _ in range(100):
        speed.count(rng.randint(98, 102), rng.uniform(0.9, 1.1))

    assert speed.tokens_per_s == pytest.approx(100, rel=0.1)
    assert 0.3 < speed.seconds(50) < 0.8


def test_deadline_in_the_past_is_told_at_once() -> None:
    """An idle model does not start on it either."""
    model = FakeModel()
    batcher = start(model)

    with pytest.raises(DeadlineExceededError):
        answers(batcher.submit(Job(id="late", deadline=time.time() - 10), texts("a")))

    assert model.batches == []
    assert answers(batcher.submit(Job(id="next"), texts("b"))) == ["B"]


# Two batches under way, as on a GPU


def start_two(model: FakeModel) -> Batcher[Text, str]:
    """Return a batcher with two threads, of batches of one item."""
    return Batcher("fake", model.run, cut_by_tokens(1, is_padded=False), n_threads=2)


def test_the_next_batch_is_under_way_while_one_runs() -> None:
    """Two are, of one job or of two, and no third."""
    model = FakeModel()
    model.hold()
    batcher = start_two(model)
    large = batcher.submit(Job(id="large"), texts("a b c d"))
    assert eventually(lambda: len(model.batches) == 2)
    small = batcher.submit(Job(id="small"), texts("e"))
    assert len(model.batches) == 2

    model.go_on.set()

    assert answers(large) == ["A", "B", "C", "D"]
    assert answers(small) == ["E"]


def test_each_job_has_its_own_answers_from_two_threads() -> None:
    """However its items were spread, in their order and once."""
    batcher = start_two(FakeModel())
    words = [[f"w{n}x{i}" for i in range(n % 7 + 1)] for n in range(200)]

    works = [batcher.submit(Job(id=f"{n}"), texts(" ".join(some))) for n, some in enumerate(words)]

    assert [answers(work) for work in works] == [[word.upper() for word in some] for some in words]


def test_one_of_two_threads_that_hangs_is_seen() -> None:
    """Although the other one works on."""
    stuck = threading.Event()

    def run(items: Sequence[Text]) -> Iterator[tuple[int, str | PenstockError] | None]:
        if items[0].text == "hang":
            stuck.wait(HELD_S)
        yield 0, items[0].text.upper()

    batcher: Batcher[Text, str] = Batcher("fake", run, cut_by_tokens(1, is_padded=False), n_threads=2)
    hung = batcher.submit(Job(id="job"), texts("hang"))

    def works_and_stalls() -> bool:
        assert answers(batcher.submit(Job(id="other"), texts("a"))) == ["A"]
        return batcher.is_stalled(0.1)

    assert eventually(works_and_stalls)
    assert not batcher.is_stalled(60)
    stuck.set()
    assert answers(hung) == ["HANG"]


def test_a_dead_thread_of_two_ends_all() -> None:
    """What neither has touched goes back, and nothing further is taken."""
    go_on = {"deadly": threading.Event(), "other": threading.Event()}

    def run(items: Sequence[Text]) -> Iterator[tuple[int, str | PenstockError] | None]:
        go_on[items[0].text].wait(HELD_S)
        if items[0].text == "deadly":
            raise SystemExit(1)
        yield 0, items[0].text.upper()

    batcher: Batcher[Text, str] = Batcher("fake", run, cut_by_tokens(1, is_padded=False), n_threads=2)
    deadly, other = (batcher.submit(Job(id=word), texts(word)) for word in go_on)
    assert eventually(lambda: deadly.is_started and other.is_started)
    waiting = batcher.submit(Job(id="waiting"), texts("waiting"))

    go_on["deadly"].set()

    with pytest.raises(RequeueError):
        answers(waiting)
    go_on["other"].set()
    assert answers(other) == ["OTHER"]
    assert batcher.is_stalled(60)
    assert not deadly.is_over


def test_the_speed_of_two_threads_is_that_of_their_device() -> None:
    """Each batch counts from the end of the one before, not from when it began to wait for the device."""
    device = threading.Lock()

    def run(items: Sequence[Text]) -> Iterator[tuple[int, str | PenstockError] | None]:
        with device:
            time.sleep(0.02)
        yield 0, items[0].text.upper()

    batcher: Batcher[Text, str] = Batcher("fake", run, cut_by_tokens(1, is_padded=False), n_threads=2)
    began = time.perf_counter()
    works = [batcher.submit(Job(id=f"{n}"), texts("a", n_tokens=100)) for n in range(30)]
    for work in works:
        assert answers(work) == ["A"]

    assert batcher.tokens_per_s == pytest.approx(3000 / (time.perf_counter() - began), rel=0.3)


# Signs of life


def test_hanging_model_is_stalled() -> None:
    """A forward pass that does not end shows, after the limit and not before."""
    model = FakeModel()
    batcher, first = start_busy(model)

    assert not batcher.is_stalled(60)
    assert eventually(lambda: batcher.is_stalled(0.02))

    model.go_on.set()
    assert answers(first) == ["FIRST"]
    assert eventually(lambda: not batcher.is_stalled(0.0))


def test_idle_model_is_not_stalled() -> None:
    """Having nothing to do is no fault, however long it lasts."""
    assert not start(FakeModel()).is_stalled(0.0)


def test_signs_of_life_are_progress() -> None:
    """A long answer is no hang as long as its tokens come."""
    alive, done = threading.Event(), threading.Event()

    def run(items: Sequence[Text]) -> Iterator[tuple[int, str | PenstockError] | None]:
        alive.wait(HELD_S)
        while not done.wait(0.002):
            yield None
        yield 0, items[0].text.upper()

    batcher: Batcher[Text, str] = Batcher("fake", run, cut_by_tokens(1, is_padded=False))
    work = batcher.submit(Job(id="job"), texts("a"))
    assert eventually(lambda: batcher.is_stalled(0.1))

    alive.set()

    assert eventually(lambda: not batcher.is_stalled(0.1))
    assert not work.is_over
    done.set()
    assert answers(work) == ["A"]
