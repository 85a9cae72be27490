"""A benchmark's own stack that does not start: the reason is told, and no Redis is blamed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.deployment import StackFailedError, deployed
from penstock.extras import how_to_install
from tests.deployment import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="tests a wheel: no benchmarks")


def absent(folder: Path, *modules: str) -> dict[str, str]:
    """Return variables with which no process can import these modules."""
    for module in modules:
        (folder / f"{module}.py").write_text(f"raise ModuleNotFoundError('gone', name={module!r})\n")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path}


def test_workers_that_end_are_told_with_their_reason() -> None:
    """`penstock up` ends, and its last lines are the error."""
    models = '[models.minilm]\ntask = "embed"\nsource = "/no/such/folder"\n'

    with pytest.raises(StackFailedError) as caught, deployed(models, processes=1):
        pass

    first, *rest = str(caught.value).splitlines()
    assert first.startswith("the benchmark's own stack did not start: `penstock up` ended with exit code ")
    assert "/no/such/folder" in "\n".join(rest)
    assert "out of reach" not in str(caught.value)


def test_a_benchmark_without_its_libraries_blames_no_redis(tmp_path: Path) -> None:
    """The run ends with the reason: what its workers lack, and how to install it."""
    command = [sys.executable, "-m", "benchmarks.overload", "--quick", "--only", "upstream"]

    done = subprocess.run(
        command, cwd=ROOT, env=absent(tmp_path, "openai"), capture_output=True, text=True, timeout=110
    )

    assert done.returncode == 1
    assert "upstream: not measured: the benchmark's own stack did not start" in done.stderr
    assert how_to_install("remote") in done.stderr
    assert "Traceback" not in done.stderr
    assert "out of reach" not in done.stderr
