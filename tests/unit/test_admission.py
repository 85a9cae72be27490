import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest

from penstock_workers.generation.admission import WINDOW_SEQUENCES, Admission
from penstock_workers.generation.batch_mode import BatchMode
from penstock_workers.generation.cache_budget import CacheBudget
from penstock_workers.generation.cache_grid import most_slots
from penstock_workers.generation.prefill_budget import PrefillBudget
from penstock_workers.generation.prefix_cache import PrefixCache
from penstock_workers.generation.running import Running
from penstock_workers.generation.sequence import ScheduledSequence, TokenSequence

CHUNK = 256
"""Prompt tokens of a pass before any was measured."""
SYSTEM = list(range(1000, 1100))
FIRST_TOKENS = itertools.count(10_000)


@dataclass
class FakeBatch:
    """A batch without tensors: what admission asks of one."""

    lengths: list[int] = field(default_factory=list)
    n_slots: int = 0

    def prefix(self, row: int, n_tokens: int) -> "FakePrefix":
        """Return the first tokens of a row."""
        assert n_tokens <= self.lengths[row]
        return FakePrefix(n_tokens)


@dataclass
class FakePrefix:
    """Tokens that need not be computed."""

    n_tokens: int


class Fixture:
    """Admission to the batch of one model, and all that it looks at."""

    def __init__(
        self, mode: BatchMode = BatchMode.CONTINUOUS, *, rows: int = 8, slots: int = 1 << 20
    ) -> None:
        make: Any = FakeBatch
        self.running: Running[str] = Running()
        self.prefixes = PrefixCache(self.running, make, is_enabled=mode.can_chunk)
        self.budget = CacheBudget(slots, self.running, self.prefixes)
        self.admission = Admission(
            mode,
            self.running,
            self.prefixes,
            self.budget,
            PrefillBudget(self.running),
            max_rows=rows,
            make_batch=make,
        )

    def wait(self, *sequences: ScheduledSequence[str]) -> None:
        """Let sequences wait."""
        for sequence in sequences:
            self.admission.add(sequence)

    def run(self, *sequences: ScheduledSequence[str]) -> None:
        """Let sequences decode."""
        batch: Any = FakeBatch(lengths=[each.n_ids for each in sequences])
        self.running.decoding, self.running.batch = list(sequences), batch

    def admit(self) -> list[ScheduledSequence[str]]:
        """Return who is prefilled next."""
        return self.admission.next_prefill()


def sequence(prompt: list[int] | int, n_new: int = 10) -> ScheduledSequence[str]:
    """Return a sequence with this prompt, or with one of this many tokens that no other begins with."""
    ids = prompt if isinstance(prompt, list) else [next(FIRST_TOKENS), *range(prompt - 1)]
    sampling: Any = None  # asked when tokens are chosen
    return ScheduledSequence(TokenSequence(sampling=sampling, prompt=ids), n_new, take=lambda _: None)


def test_oldest_enter_first() -> None:
    """Whoever fits into a pass is admitted in the order of arrival; nobody waits then."""
    waiting = [sequence(5), sequence(9), sequence(7)]
    fixture = Fixture()
    fixture.wait(*waiting)

    assert fixture.admit() == waiting
    assert fixture.admission.is_empty


def test_rows_are_counted() -> None:
    """Those that run, and a long prompt that is prefilled, have rows too."""
    fixture, late = Fixture(rows=4), [sequence(5) for _ in range(3)]
    fixture.run(sequence(4))
    fixture.wait(long := sequence(300), *late)

    assert fixture.admit() == late[:2]
    assert fixture.running.prefilling == [long]
    assert not fixture.admission.is_empty


def test_nobody_overtakes_whoever_waits_for_memory() -> None:
    """A sequence that does not fit holds back smaller ones behind it; alone it is always admitted."""
    large, small = sequence(200, n_new=800), sequence(5)
    fixture = Fixture(slots=most_slots(2, 1000))
    fixture.run(sequence(5))
    fixture.wait(large, small)
    assert fixture.admit() == []

    fixture.running.clear()

    assert fixture.admit() == [large]
    assert not fixture.admission.is_empty


def test_padding_counts_in_a_pass() -> None:
    """A pass is as wide as its longest prompt, times its rows; others may pass who has to wait."""
    first, long, short = sequence(100), sequence(140), sequence(20)
    fixture = Fixture()
    fixture.wait(first, long, short)

    assert fixture.admit() == [first, short]
    assert fixture.admit() == [long]


def test_duplicates_cost_nothing() -> None:
    """Equal prompts share a row of the pass, however many they are."""
    prompt = list(range(200))
    waiting = [sequence(prompt) for _ in range(6)]
    fixture = Fixture()
    fixture.wait(*waiting)

    assert fixture.admit() == waiting


def test_one_long_prompt_at_a_time_is_prefilled_in_chunks() -> None:
    """Its duplicates wait for the same prefill; another long prompt waits for its end."""
    prompt = list(range(CHUNK + 1))
    first, other, duplicate = sequence(prompt), sequence(CHUNK + 50), sequence(prompt)
    fixture = Fixture()
    fixture.wait(first, other, duplicate)

    assert fixture.admit() == []
    assert fixture.running.prefilling == [first, duplicate]
    fixture.running.chunked = None
    assert fixture.admit() == []
    assert fixture.running.prefilling == [other]


def test_prompts_whole_are_never_cut() -> None:
    """A model that cannot go on with a prompt gets it in one pass, alone if it is long."""
    waiting = [sequence(5000), sequence(5)]
    fixture = Fixture(BatchMode.WHOLE_PROMPTS)
    fixture.wait(*waiting)

    assert fixture.admit() == waiting[:1]
    assert fixture.running.chunked is None
    assert fixture.admit() == waiting[1:]


def test_a_prefix_that_is_being_computed_is_waited_for() -> None:
    """Of prompts that begin alike one is computed; the others are admitted when they can copy from it."""
    first, *others = (sequence([*SYSTEM, n]) for n in range(3))
    fixture = Fixture()
    fixture.wait(first, *others)

    assert fixture.admit() == [first]
    assert fixture.admit() == [others[0]]
    fixture.admission.put_back(others[:1])
    fixture.run(first)
    assert fixture.admit() == others


@pytest.mark.parametrize("mode", [BatchMode.STATIC, BatchMode.ALONE])
def test_nobody_joins_a_static_batch(mode: BatchMode) -> None:
    """Where nobody can be admitted to a running batch, newcomers wait until all have left."""
    fixture, late = Fixture(mode), sequence(5)
    fixture.run(sequence(5))
    fixture.wait(late)
    assert fixture.admit() == []

    fixture.running.clear()

    assert fixture.admit() == [late]


def test_who_failed_with_others_enters_with_fewer() -> None:
    """Bounds of a single sequence hold for all that would share a prefill, or the batch, with it."""
    waiting = [sequence(5) for _ in range(4)]
    waiting[0].max_prefill_rows = 2
    fixture = Fixture()
    fixture.wait(*waiting)
    assert fixture.admit() == waiting[:2]
    fixture.run(*waiting[:2])
    waiting[1].max_batch_rows = 3

    assert fixture.admit() == waiting[2:3]


def test_who_is_over_never_enters() -> None:
    """A sequence that nobody wants is left out, and a sweep forgets it where it waits."""
    gone, wanted = sequence(5), sequence(5)
    gone.is_over = lambda: True
    fixture = Fixture()
    fixture.wait(gone, wanted)
    assert fixture.admit() == [wanted]
    fixture.wait(gone)

    fixture.admission.sweep()

    assert fixture.admission.is_empty


def test_the_window_is_bounded() -> None:
    """However many wait, a pass is cut from the oldest ones."""
    late = sequence(5)
    fixture = Fixture()
    fixture.wait(
        first := sequence([*SYSTEM, 0]), *(sequence([*SYSTEM, 1 + n]) for n in range(WINDOW_SEQUENCES)), late
    )

    assert fixture.admit() == [first]


def test_start_is_told() -> None:
    """Whoever is admitted is told so before the prompt is computed; who waits is not."""
    told: list[str] = []
    first, second = sequence(200), sequence(200)
    first.on_start, second.on_start = lambda: told.append("first"), lambda: told.append("second")
    fixture = Fixture()
    fixture.wait(first, second)

    fixture.admit()

    assert told == ["first"]
