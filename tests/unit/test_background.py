"""Threads that must not end, and what is told of those that did."""

import threading

import pytest

from penstock_workers import background
from penstock_workers.background import Background, lost
from tests.eventually import eventually


def test_an_error_ends_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever a turn raises, the next one follows; the first error in a row is logged with its traceback."""
    n_turns = 0
    done = threading.Event()

    def turn() -> None:
        nonlocal n_turns
        n_turns += 1
        if n_turns < 4:
            raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
        done.set()
        thread.end()

    thread = Background("several", turn)
    thread.start()

    assert done.wait(30)
    thread.join(30)
    assert not thread.is_lost()
    assert [record.exc_info is not None for record in caplog.records] == [True]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ended_unasked_is_lost() -> None:
    """One that was told to end is well; one that ended otherwise is named."""
    ended = Background("ended", _exit)
    try:
        ended.start()
        ended.join(30)

        assert lost() == ["ended"]
    finally:
        ended.end()
    assert lost() == []


def test_a_thread_that_fails_for_ever_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread lives on and does nothing: after a while it counts as one that ended, until a turn is done."""
    monkeypatch.setattr(background, "FAILING_S", 0.05)
    is_broken = threading.Event()
    is_broken.set()

    def turn() -> None:
        if is_broken.is_set():
            raise ValueError

    thread = Background("failing", turn)
    thread.start()
    try:
        eventually(lambda: lost() == ["failing"], within_s=30)
        is_broken.clear()
        eventually(lambda: lost() == [], within_s=30)
    finally:
        thread.end()


def _exit() -> None:
    raise SystemExit
