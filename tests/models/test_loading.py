"""Large and quantised models: what cannot fit or run is refused before anything is loaded."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from penstock.errors import ModelLoadError
from penstock_workers.bundled import bundled_folder
from penstock_workers.checkpoint.memory import cache_bytes, check_memory, weights_bytes
from penstock_workers.embedding.embedder import Embedder
from penstock_workers.generation.generator import Generator
from penstock_workers.hardware.device import GPU_SWITCH_S
from penstock_workers.hardware.machine import left_to_groups_bytes
from penstock_workers.settings import ModelSettings
from tests.models.test_generation import CPU, SIZES, answers, load, make_folder, one_thread, request

__all__ = ["one_thread"]

TIB = 1 << 40


def declare_huge_tensor(file: Path) -> None:
    """Replace a file of weights by one that says it holds a tebibyte; nearly nothing is on the disk."""
    shape = [1 << 19, 1 << 19]
    header = json.dumps({"huge": {"dtype": "F32", "shape": shape, "data_offsets": [0, TIB]}}).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(header)) + header)
        opened.truncate(8 + len(header) + TIB)


@pytest.mark.parametrize("task", ["generate", "embed"])
def test_model_that_cannot_fit(task: Any, tmp_path: Path) -> None:
    """A file that declares a tebibyte is refused by its header, with what is needed and what is free."""
    folder = make_folder(tmp_path)
    declare_huge_tensor(folder / "model.safetensors")
    settings = ModelSettings(task=task, source=str(folder), dtype="float32")
    engine: Any = Generator if task == "generate" else Embedder

    with pytest.raises(ModelLoadError, match=r"it needs 1,024.0\d GiB of memory on cpu.* GiB are free"):
        engine.load("big", settings, CPU)


def test_memory_is_what_the_numbers_take(tmp_path: Path) -> None:
    """Weights in the format they are loaded in, and a cache for a window; one byte less is too little."""
    folder = make_folder(tmp_path)
    n_weights = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    weights = weights_bytes(str(folder), None, torch.float32)
    cache = cache_bytes(AutoConfig.from_pretrained(folder), torch.float32)

    assert weights == 4 * n_weights
    assert weights_bytes(str(folder), None, torch.bfloat16) == 2 * n_weights
    assert cache == 2 * 3 * 2 * 8 * 4 * 512
    check_memory("chat", weights, [CPU], cache=cache, free=weights + cache)
    with pytest.raises(ModelLoadError, match=r"needs .* on cpu"):
        check_memory("chat", weights, [CPU], cache=cache, free=weights + cache - 1)


def test_modules_of_an_embedding_model_are_counted() -> None:
    """Each module has weights of its own; files for other libraries are not counted."""
    weights = weights_bytes(str(bundled_folder("minilm")), None, torch.float32)

    assert weights is not None
    assert 80 << 20 < weights < 100 << 20


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"])
def test_files_that_tell_nothing_are_left_to_the_library(content: bytes, tmp_path: Path) -> None:
    """An estimate never refuses what it cannot read; whoever loads it says what is wrong."""
    (tmp_path / "model.safetensors").write_bytes(content)

    assert weights_bytes(str(tmp_path), None, torch.float32) is None
    check_memory("chat", None, [CPU], free=0)


def test_control_groups_limit_memory(tmp_path: Path) -> None:
    """The tightest group above counts, files that the system keeps do not."""
    for name, limit, used, kept in (("", "max", 0, 0), ("a", "900", 500, 100), ("a/b", "max", 0, 0)):
        group = tmp_path / "sys/fs/cgroup" / name
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 7\nfile {kept}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")

    assert left_to_groups_bytes(tmp_path) == 500
    assert left_to_groups_bytes(tmp_path / "nothing") == 1 << 62


def set_method(folder: Path, **fields: Any) -> None:
    """Say that a checkpoint is quantised."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": fields}))


@pytest.mark.parametrize(
    ("fields", "package"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, "gptqmodel"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_quantised_checkpoint_names_the_missing_package(fields: Any, package: str, tmp_path: Path) -> None:
    """What reads the format is a package of its own; without it the load fails with its name."""
    pytest.importorskip("accelerate")
    folder = make_folder(tmp_path)
    set_method(folder, **fields)

    with pytest.raises(ModelLoadError, match=package):
        load(folder)


def test_quantised_checkpoint_is_served(tmp_path: Path) -> None:
    """Weights in 8-bit floats with scales, as many models are published, answer as their numbers do."""
    pytest.importorskip("accelerate")
    folder = make_folder(tmp_path, LlamaConfig(**SIZES))
    weights = load_file(folder / "model.safetensors")
    exact = dict(weights)
    for key in [key for key in weights if "proj" in key]:
        scale = weights[key].abs().max() / 448
        small = (weights[key] / scale).to(torch.float8_e4m3fn)
        weights |= {key: small, f"{key}_scale_inv": scale.reshape(1, 1)}
        exact[key] = small.float() * scale
    save_file(exact, folder / "model.safetensors", metadata={"format": "pt"})
    expected = answers(plain := load(folder), [plain.prepare(request(max_new_tokens=8))])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    set_method(folder, quant_method="fp8", weight_block_size=[128, 128], activation_scheme="dynamic")

    generator = load(folder)

    assert answers(generator, [generator.prepare(request(max_new_tokens=8))]) == expected


def test_model_is_spread_over_devices(tmp_path: Path) -> None:
    """With `device_map = "auto"` accelerate places the layers; on CPUs alone that changes nothing."""
    pytest.importorskip("accelerate")
    folder = make_folder(tmp_path)
    settings = ModelSettings(task="generate", source=str(folder), device_map="auto")

    spread = Generator.load("chat", settings, CPU)

    prompt = spread.prepare(request(max_new_tokens=8))
    assert answers(spread, [prompt]) == answers(load(folder), [prompt])


@pytest.mark.parametrize(
    ("device", "threads", "switch_s"), [("cpu", 3, sys.getswitchinterval()), ("cuda", 1, GPU_SWITCH_S)]
)
def test_cores_are_for_torch_or_for_what_is_around_a_gpu(device: str, threads: int, switch_s: float) -> None:
    """On a CPU torch has the threads; beside a GPU it has one, and Python's take shorter turns."""
    code = (
        "import sys, torch; from penstock_workers.hardware.device import share_cores\n"
        f"share_cores(3, torch.device({device!r}))\n"
        "print(torch.get_num_threads(), sys.getswitchinterval())"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    found_threads, found_s = done.stdout.split()
    assert int(found_threads) == threads
    assert float(found_s) == pytest.approx(switch_s)
