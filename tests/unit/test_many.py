"""How many texts each job of `embed_many` has."""

import sys
from collections.abc import Iterable

import pytest

from penstock.errors import InvalidTextError
from penstock.many import FEWEST_TEXTS, TEXTS_PER_JOB, Cutter, progress_bar
from penstock.registry import Registry
from tests.announced import model, worker

MODEL = model("m", dim=4, max_tokens=8)


def served(n_workers: int, tokens_per_s: float | None = None) -> Registry:
    """Return what clients see where this many workers serve the model."""
    speed = {} if tokens_per_s is None else {"m": tokens_per_s}
    workers = tuple(
        (worker(f"w{pid}", pid=pid, models=("m",), units_per_s=speed), 0.0) for pid in range(n_workers)
    )
    return Registry(models={"m": MODEL}, workers=workers, results=None)


def sizes(texts: Iterable[str], *, n_workers: int, tokens_per_s: float | None = None) -> list[int]:
    cutter = Cutter(texts)
    cutter.learn_workers(served(n_workers, tokens_per_s), MODEL)
    found = []
    while cut := cutter.cut():
        found.append(len(cut))
    return found


def test_jobs_become_smaller_towards_a_known_end() -> None:
    """Half of what is left is spread over the workers, so that none is left with a large last job."""
    found = sizes(["a"] * 600, n_workers=2)
    assert sum(found) == 600
    assert found == sorted(found, reverse=True)
    assert found[0] == TEXTS_PER_JOB
    assert found[-2] == FEWEST_TEXTS


def test_the_last_jobs_of_long_texts_are_small_too() -> None:
    """Where the speed is known, a job is no smaller than so much work; here a text is a twentieth second."""
    found = sizes(["a" * 4000] * 200, n_workers=2, tokens_per_s=20_000.0)
    assert sum(found) == 200
    assert found == sorted(found, reverse=True)
    assert found[0] == 20  # a second
    assert found[-1] == 1

    short = sizes(["a" * 40] * 2000, n_workers=2, tokens_per_s=20_000.0)
    assert short[0] == 500  # what half of the workers' shares is
    assert short[-2] == 60


def test_few_texts_reach_all_workers() -> None:
    assert len(sizes(["a"] * TEXTS_PER_JOB, n_workers=4)) == 4


@pytest.mark.parametrize(
    ("texts", "n_workers"), [(iter(["a"] * 600), 2), (["a"] * 600, 1)], ids=["unknown end", "one worker"]
)
def test_other_jobs_are_of_one_size(texts: Iterable[str], n_workers: int) -> None:
    assert set(sizes(texts, n_workers=n_workers)[:-1]) == {TEXTS_PER_JOB}


@pytest.mark.parametrize("texts", ["one string", b"bytes"])
def test_one_string_is_no_list_of_texts(texts: Iterable[str]) -> None:
    """A string instead of a list is refused: its characters would be embedded one by one."""
    with pytest.raises(InvalidTextError, match="pass an iterable of strings"):
        Cutter(texts)


def test_a_program_without_a_console_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services of Windows and programs without a window's console have no standard error."""
    monkeypatch.setattr(sys, "stderr", None)

    with progress_bar(["a"] * 10, True) as bar:
        bar.update(10)

    assert bar.disable
