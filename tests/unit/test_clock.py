import time

import pytest

from penstock.clock import Clock, ticks


def test_before_the_first_answer_it_is_this_machines_clock() -> None:
    """There is no better one."""
    assert Clock().now() == pytest.approx(time.time(), abs=1)


def test_it_says_what_the_server_said_and_goes_on() -> None:
    """Whatever this machine's clock says."""
    clock = Clock()
    clock.learn(1000.0, ticks())

    first = clock.now()

    assert first == pytest.approx(1000, abs=1)
    assert clock.now() >= first


def test_an_answer_that_was_long_on_its_way_teaches_little() -> None:
    """A clock that is within what the answer allows stays as it is."""
    clock = Clock()
    clock.learn(1000.0, ticks())
    before = clock.now() - ticks()

    clock.learn(995.0, ticks() - 10)  # read at some moment of ten seconds
    clock.learn(999.0, ticks() - 10)

    assert clock.now() - ticks() == pytest.approx(before, abs=0.1)


def test_a_slow_first_answer_is_mended_by_the_next() -> None:
    """As with a connection that was made on the way."""
    clock = Clock()
    clock.learn(1000.0, ticks() - 30)
    clock.learn(1000.0, ticks())

    assert clock.now() == pytest.approx(1000, abs=1)


@pytest.mark.parametrize("second", [10.0, 5000.0])
def test_a_server_whose_clock_was_set_is_believed(second: float) -> None:
    """Or another server, with another clock, that has taken over."""
    clock = Clock()
    clock.learn(1000.0, ticks())
    clock.learn(second, ticks())

    assert clock.now() == pytest.approx(second, abs=1)
