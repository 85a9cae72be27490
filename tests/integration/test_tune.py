"""`penstock tune` as people type it: what it prints, and how it ends."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

from penstock_workers.command.capacity import Layout
from penstock_workers.command.tune import Measured, choose_best
from tests.deployment import ROOT
from tests.eventually import eventually

PENSTOCK = str(Path(sys.executable).with_name("penstock"))
COMMAND = [PENSTOCK, "tune", "--config", "configs/demo.toml"]


def test_the_best_layout_is_printed_to_paste() -> None:
    """Every size of batch has a line, in the time that is there; the snippet is a configuration."""
    done = subprocess.run(
        [*COMMAND, "--seconds", "1"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=110
    )

    assert (done.returncode, done.stderr) == (0, "")
    lines, toml = done.stdout.split("# for the configuration\n")
    rates = [float(line.split()[-3].replace(",", "")) for line in lines.splitlines() if "best" in line]
    assert len(rates) == 1
    assert rates[0] > 0
    assert [size in lines for size in (" 512 ", "1,024", "2,048", "4,096")] == [True] * 4
    found = tomllib.loads(toml)
    assert found["pools"]["cpu"].keys() == {"processes", "threads"}
    assert found["models"]["minilm"].keys() == {"max_batch_tokens"}


def test_ctrl_c_leaves_nothing_behind() -> None:
    """One key ends all processes, without a traceback from any of them."""
    tuning = subprocess.Popen(COMMAND, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{tuning.pid}/task/{tuning.pid}/children")
    try:
        eventually(lambda: len(children.read_text().split()) > 1, within_s=60)
        found = children.read_text().split()
        os.killpg(tuning.pid, signal.SIGINT)
        _, errors = tuning.communicate(timeout=30)
    finally:
        tuning.kill()

    assert tuning.returncode == 1
    assert errors.split() == ["Aborted!"]
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in found), within_s=10)


def test_a_model_that_cannot_be_loaded_is_told() -> None:
    """One line that says why, from the process that tried."""
    done = subprocess.run(
        [*COMMAND, "--set", "models.minilm.source=/no/such/folder"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )

    assert done.returncode == 1
    assert done.stdout == ""
    assert "/no/such/folder does not exist" in done.stderr.splitlines()[-1]


def test_generation_models_are_not_measured() -> None:
    """Only embedding is measured, and what is asked for in vain is named."""
    done = subprocess.run(
        [*COMMAND, "--model", "chat"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode == os.EX_CONFIG
    assert done.stderr == "pool cpu embeds with no 'chat'; its models: minilm\n"


def test_noise_does_not_choose() -> None:
    """Among candidates that are as fast, small batches are taken, and the layout that needs less memory."""
    one, two = Layout(processes=1, threads=2), Layout(processes=2, threads=1)

    def measured(layout: Layout, size: int, rate: float, n_bytes: int) -> Measured:
        return Measured(
            layout=layout, model="m", max_batch_tokens=size, texts_per_s=rate, memory_bytes=n_bytes
        )

    close = [measured(two, 512, 90, 9), measured(two, 1024, 99, 9), measured(two, 2048, 100, 9)]
    assert choose_best([*close, measured(one, 512, 96, 5)]) == [close[1]]
    assert choose_best([*close, measured(one, 512, 98, 5)]) == [measured(one, 512, 98, 5)]
