"""A benchmark says before it begins what it leaves out, and loses no results of one section to another."""

import argparse
import json
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from benchmarks import overload, report, sections
from benchmarks.deployment import StackFailedError
from benchmarks.neighbours import TOLERABLE
from benchmarks.report import Figure, Row
from benchmarks.sections import Results, missing, runnable
from penstock.errors import DeadlineExceededError
from penstock.extras import how_to_install
from tests.deployment import ROOT

ROWS = [Row(way="ours", unit="jobs/s", values=[1.0, 2.0])]
FIGURES = {"rate": Figure(value=1.5, unit="jobs/s")}


@pytest.fixture
def without_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `make demo`: the extra `remote` is not installed."""

    def version(package: str) -> str:
        if package == "openai":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(sections, "version", version)


def options(json_file: Path | None = None) -> argparse.Namespace:
    """Return the options of a run."""
    return argparse.Namespace(json=json_file, plot=None)


@pytest.mark.usefixtures("without_openai")
def test_a_section_without_its_extra_is_left_out_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever reads the first line knows what will be missing, and how to have it."""
    assert missing("remote") == ["openai"]
    assert runnable(["load", "upstream", "recovery"], overload.NEEDS) == ["load", "recovery"]
    assert capsys.readouterr().err.splitlines() == [
        "left out: upstream: openai not installed: " + how_to_install("remote")
    ]


def test_what_is_installed_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left out, and nothing said."""
    monkeypatch.setattr(sections, "version", lambda package: package)

    assert runnable(["load", "upstream"], overload.NEEDS) == ["load", "upstream"]
    assert capsys.readouterr().err == ""


def test_sections_need_extras_that_there_are() -> None:
    """An extra that gets another name takes the benchmark's table along."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    assert set(overload.NEEDS.values()) <= extras.keys()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StackFailedError("the benchmark's own stack did not start: x"), "own stack did not start: x"),
        (DeadlineExceededError("j", 1.0), "not measured: "),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_section_that_fails_takes_no_results_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, told: str
) -> None:
    """The others are reported and written, and the run ends with an error that names the one."""
    results = Results()
    with results.section("load"):
        results.add("load", ROWS, FIGURES)
    with results.section("upstream"):
        raise error
    with results.section("recovery"):
        results.add("recovery", ROWS, {"back": FIGURES["rate"]})

    with pytest.raises(SystemExit) as caught:
        results.finish("overload", options(tmp_path / "found.json"))

    assert json.loads((tmp_path / "found.json").read_text())["figures"].keys() == {"rate", "back"}
    assert "ours" in capsys.readouterr().out
    assert str(caught.value.code).startswith("upstream: not measured: ")
    assert told in str(caught.value.code)


def test_a_whole_run_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody else was at work, so the figures count."""
    results = Results()
    results.add("load", ROWS, FIGURES, others=TOLERABLE / 2)

    results.finish("overload", options())

    assert "load, share of other programs" in capsys.readouterr().out


def test_a_disturbed_section_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Its figures are shown, and the run ends with an error."""
    results = Results()
    results.add("load", ROWS, FIGURES, others=0.5)

    with pytest.raises(SystemExit, match="load: other programs took 50% of the CPUs"):
        results.finish("overload", options())
    assert "rate" in capsys.readouterr().out


def test_a_run_without_results_says_so() -> None:
    """All sections were left out."""
    with pytest.raises(SystemExit, match="nothing was measured"):
        Results().finish("overload", options())


def test_a_picture_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Matplotlib is asked for at the start, not when minutes of results are there."""
    monkeypatch.setattr(report, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["overload", "--plot", "found.svg"])

    with pytest.raises(SystemExit):
        report.arguments("A benchmark.", ["load"])

    assert how_to_install("dev") in capsys.readouterr().err
