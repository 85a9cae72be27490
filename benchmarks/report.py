"""What every benchmark prints: the machine, every way that was measured, and figures with their goals."""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from penstock.extras import how_to_install


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured way.

    Attributes:
        way: what was measured.
        unit: of the values.
        values: one for each repetition.
        at: when each was, seconds, where that is worth a picture; rows whose ways begin alike share one.
    """

    way: str
    unit: str
    values: Sequence[float]
    at: Sequence[float] = ()

    @property
    def median(self) -> float:
        """The middle one; machines are noisy."""
        return statistics.median(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number that a goal was set for; `at_most` tells which side of the goal is good."""

    value: float
    unit: str
    goal: float | None = None
    at_most: bool = False

    def to_dict(self) -> dict[str, object]:
        """Return it for JSON."""
        met = None
        if self.goal is not None:
            met = self.value <= self.goal if self.at_most else self.value >= self.goal
        return {"value": self.value, "unit": self.unit, "goal": self.goal, "met": met}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run of a benchmark."""

    name: str
    rows: Sequence[Row]
    figures: Mapping[str, Figure]
    machine: Mapping[str, object] = field(default_factory=lambda: describe_machine())

    def print(self) -> None:
        """Print tables for people."""
        print(f"# {self.name}: {', '.join(f'{key} {value}' for key, value in self.machine.items())}")
        width = max(len(row.way) for row in self.rows)
        for row in self.rows:
            low, high = min(row.values), max(row.values)
            digits = 3 if row.unit else 5  # ratios and cosines have none
            spread = f"(from {low:.{digits}f} to {high:.{digits}f})"
            print(f"{row.way:{width}}  {row.median:12.{digits}f} {row.unit}  {spread}")
        for key, figure in self.figures.items():
            found = figure.to_dict()
            goal = "" if figure.goal is None else f"  goal {'<=' if figure.at_most else '>='} {figure.goal:g}"
            verdict = {True: "  met", False: "  MISSED", None: ""}[found["met"]]  # type: ignore[index]
            print(f"{key:{width}}  {figure.value:12.5f} {figure.unit}{goal}{verdict}")

    def write_json(self, path: Path) -> None:
        """Write all of it."""
        figures = {key: figure.to_dict() for key, figure in self.figures.items()}
        rows = [asdict(row) | {"median": row.median} for row in self.rows]
        found = {"benchmark": self.name, "machine": dict(self.machine), "rows": rows, "figures": figures}
        path.write_text(json.dumps(found, indent=2) + "\n")

    def plot(self, path: Path) -> None:
        """Draw what happened over time, or else the medians of the first row's unit, with their spread."""
        import matplotlib.pyplot as plt

        panels: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.at:
                panels.setdefault(row.way.partition(",")[0], []).append(row)
        if panels:
            figure, all_axes = plt.subplots(
                len(panels), figsize=(8, 2 * len(panels)), layout="constrained", squeeze=False
            )
            for axes, (name, rows) in zip(all_axes[:, 0], panels.items(), strict=True):
                for row in rows:
                    label = row.way.partition(", ")[2]
                    axes.plot(row.at, row.values, marker=".", markersize=3, linewidth=0.8, label=label)
                axes.set(title=name, ylabel=rows[0].unit, ylim=(0, None))
                axes.legend(fontsize="small")
            all_axes[-1, 0].set_xlabel("s")
            figure.savefig(path, dpi=120)
            return
        rows = [row for row in self.rows if row.unit == self.rows[0].unit]
        spread = [
            [row.median - min(row.values) for row in rows],
            [max(row.values) - row.median for row in rows],
        ]
        figure, axes = plt.subplots(figsize=(8, 0.6 * len(rows) + 1.2), layout="constrained")
        axes.barh([row.way for row in rows], [row.median for row in rows], xerr=spread, color="#4477aa")
        axes.set(xlabel=rows[0].unit, title=self.name)
        axes.invert_yaxis()
        figure.savefig(path, dpi=120)


def arguments(description: str | None, sections: Sequence[str] = ()) -> argparse.Namespace:
    """Read the options that all benchmarks take; `only` is there where there are sections, all by default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: the same code, fewer repetitions"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them, as .png or .svg")
    if sections:
        what = ", ".join(sections)
        parser.add_argument(
            "--only", choices=sections, nargs="+", default=sections, metavar="SECTION", help=what
        )
    return parsed(parser)


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line; what a picture needs is asked for now, not when minutes of results are there."""
    options = parser.parse_args()
    if options.plot and find_spec("matplotlib") is None:
        parser.error(f"--plot: matplotlib is not installed: {how_to_install('dev')}")
    return options


def finish(report: Report, options: argparse.Namespace) -> None:
    """Print a report, and write what was asked for."""
    report.print()
    if options.json:
        report.write_json(options.json)
    if options.plot:
        report.plot(options.plot)


def describe_machine() -> dict[str, Any]:
    """Return what a reader needs to compare machines."""
    cpu = next((line for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "").split()
    names = ("celery", "redis", "sentence-transformers", "torch", "transformers")
    return {
        "cpu": cpu.partition(": ")[2] or platform.processor(),
        "cores": os.cpu_count(),
        "bf16": bool({"avx512_bf16", "amx_bf16"} & set(flags)),
        **({"gpus": "; ".join(gpus)} if (gpus := _gpus()) else {}),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
