"""Engines of one process take turns on its device, by their shares."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest

from penstock_workers.batching.batcher import Batcher
from penstock_workers.batching.cuts import cut_by_tokens
from penstock_workers.batching.feed import Job
from penstock_workers.batching.scheduler import Scheduler
from penstock_workers.batching.turns import Device, Turn
from tests.eventually import eventually
from tests.unit.test_batching import Text, texts
from tests.unit.test_scheduler import FakeSteps, Spelling, Word, spell, words


@dataclass
class Clock:
    """Time that passes where a test says so."""

    now: float = 0.0

    def __call__(self) -> float:
        """Return what it is."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def device(clock: Clock) -> Device:
    return Device(clock)


def use(turn: Turn, clock: Clock, seconds: float) -> None:
    """Have the device for so long."""
    with turn:
        clock.now += seconds


def together(device: Device, *engines: Callable[[], None]) -> None:
    """Run engines whose first turns all come after one that is under way."""
    threads = [threading.Thread(target=engine) for engine in engines]
    with device.turn(1):
        for n, thread in enumerate(threads, 1):
            thread.start()
            eventually(lambda n=n: len(device._waiting) == n)  # type: ignore[misc]  # a lambda in a loop
    for thread in threads:
        thread.join()


def test_who_had_least_goes_first(device: Device, clock: Clock) -> None:
    """Among those that wait, time on the device over the share decides, not who came first."""
    turns = {name: device.turn(share) for name, share in (("much", 1), ("large share", 10), ("little", 1))}
    for name, seconds in (("much", 8.0), ("large share", 30.0), ("little", 2.0)):
        use(turns[name], clock, seconds)
    order: list[str] = []

    def engine(name: str) -> Callable[[], None]:
        def run() -> None:
            with turns[name]:
                order.append(name)

        return run

    together(device, *(engine(name) for name in turns))

    assert order == ["little", "large share", "much"]


@pytest.mark.parametrize(("share", "n_units"), [(1, 20), (3, 30)])
def test_time_is_shared_by_weight(device: Device, clock: Clock, share: float, n_units: int) -> None:
    """Of two engines that always have work, each has its share, in pieces as small as its pauses allow."""
    log: list[str] = []

    def engine(name: str, turn: Turn) -> Callable[[], None]:
        def run() -> None:
            with turn:
                while len(log) < 40:
                    log.append(name)
                    clock.now += 1
                    turn.pause()

        return run

    together(device, engine("a", device.turn(share)), engine("b", device.turn(1)))

    assert abs(log[:40].count("a") - n_units) <= 1
    assert max(map(len, "".join(log[:40]).split("b"))) <= share + 1


def test_time_without_work_is_not_saved_up(device: Device, clock: Clock) -> None:
    """Who comes back goes first, and not for longer because the others had the device alone."""
    busy, rare = device.turn(1), device.turn(1)
    for _ in range(100):
        use(busy, clock, 1)
    log: list[str] = []

    def engine(name: str, turn: Turn) -> Callable[[], None]:
        def run() -> None:
            with turn:
                for _ in range(4):
                    log.append(name)
                    clock.now += 1
                    turn.pause()

        return run

    together(device, engine("busy", busy), engine("rare", rare))

    assert log[0] == "rare"
    assert "rare rare rare" not in " ".join(log)


def test_a_text_is_embedded_in_the_middle_of_a_step() -> None:
    """A batch waits for the end of a layer and not for the end of a step, which then goes on."""
    device = Device()
    step_turn = device.turn(1)
    is_embedded = threading.Event()
    was_embedded_within: list[bool] = []

    class LongSteps(FakeSteps):
        def step(self) -> list[tuple[Spelling, str]]:
            def layer() -> bool:
                step_turn.pause()
                return is_embedded.is_set()

            eventually(layer)
            was_embedded_within.append(True)
            return super().step()  # type: ignore[return-value]  # no word fails here

    def run(batch: Sequence[Text]) -> Iterator[tuple[int, str]]:
        is_embedded.set()
        yield from ((index, item.text.upper()) for index, item in enumerate(batch))

    steps = LongSteps()
    steps.gate.set()
    scheduler: Scheduler[Word, Spelling, str] = Scheduler("chat", steps, spell, step_turn)
    batcher: Batcher[Text, str] = Batcher("embed", run, cut_by_tokens(8), device.turn(2))

    answer = scheduler.submit(Job(id="long"), words("word"))
    eventually(lambda: device._holder is step_turn)
    vector = batcher.submit(Job(id="short"), texts("a"))

    assert vector.wait() == ["A"]
    assert answer.wait() == ["WORD"]
    assert was_embedded_within
