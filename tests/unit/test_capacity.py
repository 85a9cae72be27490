import json
import os
from pathlib import Path
from typing import Any

import pytest

from penstock_workers.command.capacity import (
    PROCESS_BYTES,
    SHARED_BYTES,
    UNSEEN_WEIGHTS_BYTES,
    WEIGHTS_FACTOR,
    Layout,
    choose_layouts,
    choose_threads,
    process_bytes,
)
from penstock_workers.command.tune import candidates
from penstock_workers.configuration import load_settings
from penstock_workers.hardware.machine import Machine, read_machine
from penstock_workers.settings import Settings

MINILM = {"task": "embed", "source": "bundled:minilm"}
CHAT = {"task": "generate", "source": "bundled:tiny-chat"}
LARGE = Machine(cores=16, memory_bytes=1 << 40)


def settings(models: Any, **arguments: str) -> Settings:
    """Return the settings of a deployment; arguments are dotted keys under `pools`."""
    given = {f"pools.{key.replace('_', '.')}": text for key, text in arguments.items()}
    return load_settings(arguments={"models": json.dumps(models), **given}, environ={}).settings


def write(root: Path, files: dict[str, str]) -> Path:
    """Lay files under a root of their own."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("models", "arguments", "layout"),
    [
        ({"m": MINILM}, {}, Layout(processes=16, threads=1)),
        ({"m": MINILM}, {"cpu_threads": "3"}, Layout(processes=5, threads=3)),
        ({"m": MINILM}, {"cpu_threads": "64"}, Layout(processes=1, threads=64)),
        ({"m": MINILM}, {"cpu_processes": "3"}, Layout(processes=3, threads=1)),
        ({"m": MINILM, "c": CHAT}, {}, Layout(processes=4, threads=4)),
        ({"m": MINILM, "c": CHAT}, {"cpu_processes": "8"}, Layout(processes=8, threads=2)),
        ({"c": CHAT}, {"cpu_processes": "64"}, Layout(processes=64, threads=1)),
        ({"c": CHAT}, {"cpu_processes": "0"}, Layout(processes=0, threads=4)),
    ],
    ids=str,
)
def test_cores_are_shared_out(models: Any, arguments: dict[str, str], layout: Layout) -> None:
    """One thread each for embedding alone; where text is generated, fewer processes of more threads."""
    assert choose_layouts(settings(models, **arguments), LARGE) == {"cpu": layout}


def test_memory_limits_processes() -> None:
    """As many processes as fit by their estimate, and one where none fits."""
    found = settings({"m": MINILM})
    each = process_bytes(found.models)

    for n_bytes, n in ((each * 3, 3), (each * 3 - 1, 2), (each - 1, 1)):
        machine = Machine(cores=16, memory_bytes=SHARED_BYTES + n_bytes)
        assert choose_layouts(found, machine)["cpu"].processes == n


def test_estimate_counts_the_weights_on_disk(tmp_path: Path) -> None:
    """Safetensors, else other weights; a model that is not here yet counts as a large one."""
    both, other, empty = tmp_path / "both", tmp_path / "other", tmp_path / "empty"
    for folder, name, size in (
        (both / "2_Dense", "model.safetensors", 100),
        (both, "model.safetensors", 1000),
        (both, "pytorch_model.bin", 5000),
        (other, "pytorch_model.bin", 300),
        (empty, "config.json", 9),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(size))
    sources = {str(both): 1100, str(other): 300, str(empty): UNSEEN_WEIGHTS_BYTES}
    sources |= {"/no/such/folder": UNSEEN_WEIGHTS_BYTES, "penstock-tests/no-such": UNSEEN_WEIGHTS_BYTES}

    for source, n_bytes in sources.items():
        models = settings({"m": {"task": "embed", "source": source}}).models
        assert process_bytes(models) == PROCESS_BYTES + WEIGHTS_FACTOR * n_bytes


def test_a_worker_alone_counts_its_own_models() -> None:
    """`--model` decides: a process that only embeds has one thread, whatever its pool serves besides."""
    found = settings({"m": MINILM, "c": CHAT})

    assert choose_threads(found, "cpu", [found.models["m"]], LARGE) == 1
    assert choose_threads(found, "cpu", found.models.values(), LARGE) == 4
    assert choose_threads(found, "cpu", found.models.values(), Machine(cores=2, memory_bytes=1)) == 1


def test_trial_of_the_gpu_pool_leaves_the_cores_to_the_other() -> None:
    """A pool of GPUs that computes on the CPU has one process unless more are asked for."""
    both = {"m": MINILM | {"pools": ["gpu", "cpu"]}}

    found = choose_layouts(settings(both, gpu_device="cpu"), LARGE)

    assert found == {"gpu": Layout(processes=1, threads=1), "cpu": Layout(processes=16, threads=1)}


def test_gpus_that_are_not_there_get_no_process() -> None:
    """Nothing is started for `auto` without a GPU; a device asked for by name is, and then complains."""
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("a GPU is there")
    on_gpus = {"m": MINILM | {"pools": ["gpu"]}}

    assert choose_layouts(settings(on_gpus), LARGE)["gpu"].processes == 0
    assert choose_layouts(settings(on_gpus, gpu_device="cuda"), LARGE)["gpu"].processes == 1
    assert choose_layouts(settings(on_gpus, gpu_processes="3"), LARGE)["gpu"].processes == 3
    spread = {"m": CHAT | {"pools": ["gpu"], "device_map": "auto"}}
    assert choose_layouts(settings(spread), LARGE)["gpu"].processes == 0
    assert choose_layouts(settings(spread, gpu_device="cuda"), LARGE)["gpu"] == Layout(processes=1, threads=4)


LARGE_MODEL = {"task": "embed", "source": "penstock-tests/no-such"}  # counts as 1 GiB


@pytest.mark.parametrize(
    ("models", "arguments", "processes", "threads"),
    [
        ({"m": MINILM}, {}, 8, 2),
        ({"m": LARGE_MODEL}, {}, 2, 4),
        ({"m": MINILM, "l": LARGE_MODEL}, {}, 2, 4),
        ({"m": MINILM, "c": CHAT}, {}, 2, 4),
        ({"m": MINILM}, {"gpu_processes": "3"}, 3, 4),
        ({"m": MINILM}, {"gpu_processes": "16"}, 16, 1),
        ({"m": MINILM}, {"gpu_threads": "7"}, 8, 7),
    ],
    ids=str,
)
def test_small_models_have_several_processes_on_a_gpu(
    models: Any, arguments: dict[str, str], processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU waits for the CPU where models are small; a large or a generating one fills it."""
    monkeypatch.setattr(
        "penstock_workers.command.capacity.find_gpus", lambda: ("0", "1")
    )  # there is none here
    on_gpus = {name: model | {"pools": ["gpu"]} for name, model in models.items()}

    layout = choose_layouts(settings(on_gpus, **arguments), LARGE)["gpu"]

    assert layout == Layout(processes=processes, threads=threads, gpus=("0", "1"))


def test_tune_tries_several_processes_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its share of the cores, never more processes than cores."""
    monkeypatch.setattr("penstock_workers.command.tune.find_gpus", lambda: ("0",))  # there is none here
    on_gpus = settings({"m": MINILM | {"pools": ["gpu"]}})

    for cores, expected in ((16, [(1, 4), (2, 4), (4, 4)]), (4, [(1, 4), (2, 2), (4, 1)]), (1, [(1, 1)])):
        machine = Machine(cores=cores, memory_bytes=1 << 40)
        monkeypatch.setattr("penstock_workers.command.tune.read_machine", lambda machine=machine: machine)
        found = candidates(on_gpus, "gpu", ["m"])
        assert [(layout.processes, layout.threads) for layout in found] == expected
        assert {layout.gpus for layout in found} == {("0",)}


@pytest.mark.gpu
def test_each_gpu_has_processes() -> None:
    """As many processes for each GPU that CUDA shows, each of which sees one GPU alone."""
    import torch

    layout = choose_layouts(settings({"m": MINILM | {"pools": ["gpu"]}}), LARGE)["gpu"]

    assert len(set(layout.gpus)) == torch.cuda.device_count()
    assert layout.processes % len(layout.gpus) == 0


def test_control_groups_limit_the_machine(tmp_path: Path) -> None:
    """The tightest of our group and those above it counts, and no group outside of ours."""
    root = write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB",
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            "sys/fs/cgroup/a/b/memory.max": "max",
            "sys/fs/cgroup/a/cpu.max": "150000 100000",
            "sys/fs/cgroup/a/memory.max": "4096000",
            "sys/fs/cgroup/other/memory.max": "1",
            "sys/memory.max": "1",
        },
    )

    assert read_machine(root) == Machine(cores=1, memory_bytes=4_096_000)


def test_a_share_of_a_core_is_one(tmp_path: Path) -> None:
    """Half a core still runs a process; a container sees its own group as the root of all."""
    root = write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"})

    assert read_machine(root).cores == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux tells affinities")
def test_affinity_limits_the_machine() -> None:
    """A process that is bound to one core counts one."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        bound = read_machine()
    finally:
        os.sched_setaffinity(0, before)

    assert bound.cores == 1
    assert bound.memory_bytes > 0
