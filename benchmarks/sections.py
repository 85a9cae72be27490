"""Sections of a benchmark: which can run here, and what is kept when one fails."""

import argparse
import re
import sys
import tomllib
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.deployment import StackFailedError
from benchmarks.neighbours import TOLERABLE
from benchmarks.report import Figure, Report, Row, finish
from penstock.errors import PenstockError
from penstock.extras import how_to_install

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def runnable(sections: Iterable[str], needs: Mapping[str, str]) -> list[str]:
    """Return the sections that can run here; standard error names the others, and what to install.

    Args:
        sections: Names, in their order.
        needs: The extra that a section needs, by its name; the others need none besides the benchmark's.
    """
    found = []
    for section in sections:
        absent = missing(needs[section]) if section in needs else []
        if absent:
            what = f"{', '.join(absent)} not installed: {how_to_install(needs[section])}"
            print(f"left out: {section}: {what}", file=sys.stderr)
        else:
            found.append(section)
    return found


def missing(extra: str) -> list[str]:
    """Return the packages of an extra that are not installed here."""
    wanted = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"][extra]
    names = [re.split(r"[\s\[=<>!~;]", line, maxsplit=1)[0] for line in wanted]
    return [name for name in names if name != "penstock" and not _is_installed(name)]


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


class Results:
    """What the sections measured, one after the other: one that fails takes nothing of the others along.

    Attributes:
        rows: Every measured way.
        figures: Numbers that goals were set for, by name.
        troubles: Sections that failed or cannot be trusted, a line each.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.figures: dict[str, Figure] = {}
        self.troubles: list[str] = []

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Note an error of the block as the section's, and go on after it."""
        try:
            yield
        except (PenstockError, StackFailedError) as error:
            self.troubles.append(f"{name}: not measured: {error}")
        except Exception as error:  # noqa: BLE001  # the minutes that other sections took are not lost
            traceback.print_exc()
            self.troubles.append(f"{name}: not measured: {type(error).__name__}: {error}")

    def add(
        self,
        name: str,
        rows: Sequence[Row],
        figures: Mapping[str, Figure],
        *,
        others: float | None = None,
    ) -> None:
        """Keep what a section measured.

        Args:
            name: The section.
            rows: What it measured.
            figures: What it found, by name.
            others: Share of the CPUs that other programs took meanwhile, where that was watched.
        """
        self.rows += rows
        self.figures |= figures
        if others is not None:
            self.rows.append(Row(way=f"{name}, share of other programs", unit="", values=[others]))
            if others > TOLERABLE:
                self.troubles.append(f"{name}: other programs took {others:.0%} of the CPUs, measure again")

    def finish(self, benchmark: str, options: argparse.Namespace) -> None:
        """Report what there is, then end with an error if that is not all.

        Raises:
            SystemExit: A section failed or cannot be trusted, or nothing was measured.
        """
        if self.rows:
            finish(Report(name=benchmark, rows=self.rows, figures=self.figures), options)
        if self.troubles or not self.rows:
            sys.exit("\n".join(self.troubles or ["nothing was measured"]))
