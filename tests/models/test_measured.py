"""What was faster at one start is taken at the next, and measured again when it cannot be believed."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from penstock_workers.embedding.bfloat16 import Bfloat16
from penstock_workers.embedding.c_kernels import Kernels
from penstock_workers.embedding.embedder import Embedder
from penstock_workers.embedding.measured import KEPT_S, machine_key, recall, remember
from penstock_workers.embedding.packed import PackedBert
from penstock_workers.settings import ModelSettings
from tests.models.test_packed import CPU, build


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "penstock" / "measured"


@pytest.mark.parametrize("winner", ["torch", "openvino"])
def test_the_next_start_measures_nothing(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, winner: str
) -> None:
    """The race is run once; whoever won it is loaded again, whichever it was."""
    pytest.importorskip("openvino")
    build(tmp_path, "bert-cls")
    settings = ModelSettings(task="embed", source=str(tmp_path / "model"))
    caplog.set_level(logging.INFO)
    Embedder.load("small", settings, CPU)
    assert "OpenVINO took" in caplog.text
    (file,) = cache.iterdir()
    kept = json.loads(file.read_text())
    kept["choices"]["engine"] = winner
    file.write_text(json.dumps(kept))

    caplog.clear()
    engine = Embedder.load("small", settings, CPU)
    assert "OpenVINO took" not in caplog.text
    assert (engine.batching == "padded, OpenVINO") == (winner == "openvino")


@pytest.mark.parametrize("winner", ["C", "torch"])
def test_the_faster_products_are_taken_again(
    tmp_path: Path, cache: Path, kernels: Kernels, winner: str
) -> None:
    """Ours or oneDNN's, whichever it was: CPUs with tiles are good at the latter."""
    assert kernels.version
    build(tmp_path, "bert-cls")
    settings = ModelSettings(task="embed", source=str(tmp_path / "model"), engine="torch", dtype="bfloat16")
    Embedder.load("small", settings, CPU)
    (file,) = cache.iterdir()
    kept = json.loads(file.read_text())
    assert kept["choices"]["products"] in ("C", "torch")
    kept["choices"]["products"] = winner
    file.write_text(json.dumps(kept))

    engine = Embedder.load("small", settings, CPU)

    assert isinstance(engine._way, PackedBert if winner == "C" else Bfloat16)
    assert json.loads(file.read_text())["choices"]["products"] == winner


def test_other_weights_are_measured_anew(tmp_path: Path, cache: Path) -> None:
    """A model that was trained further in its folder may lose in bfloat16 what it kept before."""
    settings = ModelSettings(task="embed", source=str(tmp_path / "model"), engine="torch")
    model = build(tmp_path, "bert-cls")
    Embedder.load("small", settings, CPU)
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    model.save_pretrained(str(tmp_path / "model"))
    Embedder.load("small", settings, CPU)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\x00", b"[]", b"{}", b'{"at": "now", "choices": {}}', b'{"at": 0, "choices": {"a": "b"}}'],
)
def test_what_cannot_be_believed_is_left(cache: Path, content: bytes) -> None:
    """A file that is broken, or old, is as good as none, and is replaced."""
    key = machine_key("f", "cpu", 1, "")
    remember(key, {"engine": "torch"})
    (file,) = cache.iterdir()
    assert recall(key) == {"engine": "torch"}
    file.write_bytes(content)
    assert recall(key) == {}
    remember(key, {"engine": "openvino"})
    assert recall(key) == {"engine": "openvino"}


def test_choices_grow_old(cache: Path) -> None:
    """After a week a machine that was busy when it was measured has another chance."""
    key = machine_key("f", "cpu", 1, "")
    remember(key, {"engine": "torch"})
    (file,) = cache.iterdir()
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({**kept, "at": kept["at"] - KEPT_S}))
    assert recall(key) == {}


def test_without_a_place_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be made costs a measurement at each start, and nothing else."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remember(machine_key("f", "cpu", 1, ""), {"engine": "torch"})
    assert recall(machine_key("f", "cpu", 1, "")) == {}


def test_processes_share_what_they_found(cache: Path) -> None:
    """A file is there whole or not at all, and nobody's draft stays."""
    remember(machine_key("f", "cpu", 1, ""), {"engine": "torch"})
    assert [file.suffix for file in cache.iterdir()] == [".json"]
    assert not list(cache.glob(f"*.{os.getpid()}"))
