"""Weights that processes of one machine have in common."""

import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock_workers.embedding.measured import recall, remember
from penstock_workers.embedding.shared_weights import UNUSED_S, share

LOAD = """
import sys, torch
from penstock_workers.embedding.shared_weights import share
kept = share([torch.ones(2_000_000), torch.arange(7)])
print(int(kept[0].sum()), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "penstock" / "weights"


@pytest.fixture
def tensors() -> list[Tensor]:
    """Of several types and odd sizes."""
    torch.manual_seed(0)
    return [torch.randn(3, 5).bfloat16(), torch.randn(17), torch.arange(40).view(4, 10)]


def are_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether they are the same in everything but their place."""
    return [t.dtype for t in some] == [t.dtype for t in others] and all(map(torch.equal, some, others))


def test_they_are_the_same_and_elsewhere(folder: Path, tensors: list[Tensor]) -> None:
    """One file for the same contents, each tensor at the beginning of a cache line."""
    first, second = share(tensors), share(tensors)

    assert are_equal(first, tensors)
    assert are_equal(second, tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in first)
    assert {tensor.data_ptr() for tensor in first}.isdisjoint(tensor.data_ptr() for tensor in tensors)
    assert len(list(folder.iterdir())) == 1
    share([*tensors, torch.ones(1)])
    assert len(list(folder.iterdir())) == 2


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what processes share")
def test_two_processes_have_them_once(folder: Path) -> None:
    """Of eight megabytes each process has half."""
    processes = [
        subprocess.Popen([sys.executable, "-c", LOAD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"2000000\n"
        (file,) = folder.iterdir()
        for process in processes:
            maps = Path(f"/proc/{process.pid}/smaps").read_text()
            found = re.search(rf"{re.escape(str(file))}\n(?:.+\n)*?Pss: +(\d+) kB", maps)
            assert found is not None
            assert int(found[1]) == pytest.approx(4000, rel=0.05)  # 8 MB are 7,813 kB
    finally:
        for process in processes:
            process.communicate()


@pytest.mark.parametrize("content", [b"", b"too short", bytes(512)])
def test_a_damaged_file_is_not_believed(folder: Path, tensors: list[Tensor], content: bytes) -> None:
    """What is in it is compared, and made anew."""
    share(tensors)
    (file,) = folder.iterdir()
    file.write_bytes(content)

    found = share(tensors)

    assert are_equal(found, tensors)
    assert found[0] is not tensors[0]
    assert len(file.read_bytes()) == 64 + 128 + 320


def test_without_a_place_each_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tensors: list[Tensor]
) -> None:
    """A file system that nobody may write to costs memory, and nothing else."""
    caplog.set_level(logging.INFO)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    assert share(tensors)[0] is tensors[0]

    assert "not shared between processes" in caplog.text


def test_a_disk_is_not_filled(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What would take half of a small disk stays in memory of its own; what is small lies there."""
    caplog.set_level(logging.INFO)
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        large, small = [torch.ones(200_000)], [torch.ones(10)]

        assert share(large)[0] is large[0]
        assert "half of what is free" in caplog.text
        assert not list(folder.iterdir())
        assert share(small)[0] is not small[0]
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_what_nobody_uses_is_removed(folder: Path, tensors: list[Tensor]) -> None:
    """A week after its last start a model's file goes; one that is used stays."""
    files = []
    for tensor in tensors:
        share([tensor])
        (file,) = set(folder.iterdir()).difference(files)
        files.append(file)
    old, used, new = files
    for file in (old, used):
        os.utime(file, (0, time.time() - UNUSED_S - 60))
    share(tensors[1:2])

    share([torch.ones(1)])

    assert not old.exists()
    assert used.exists()
    assert new.exists()


def test_files_are_for_this_user_alone(folder: Path, tensors: list[Tensor]) -> None:
    """Whatever the mask of new files says."""
    before = os.umask(0)
    try:
        share(tensors)
        remember("key", {"engine": "torch"})
    finally:
        os.umask(before)

    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    kept = [*folder.iterdir(), *(folder.parent / "measured").iterdir()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in kept} == {0o600}
    assert recall("key") == {"engine": "torch"}


def link_to_a_folder(folder: Path) -> None:
    """A place of somebody's choice."""
    elsewhere = folder.parent.parent / "elsewhere"
    folder.parent.rename(elsewhere)
    folder.parent.symlink_to(elsewhere)


def open_folder(folder: Path) -> None:
    """Others may put files there."""
    folder.chmod(0o777)


def open_file(folder: Path) -> None:
    """Others may write to what would be mapped."""
    next(folder.iterdir()).chmod(0o666)


def link_to_a_file(folder: Path) -> None:
    """The same contents, elsewhere."""
    file = next(folder.iterdir())
    file.rename(folder.parent / "elsewhere.bin")
    file.symlink_to(folder.parent / "elsewhere.bin")


@pytest.mark.parametrize("spoil", [link_to_a_folder, open_folder, open_file, link_to_a_file])
def test_what_others_may_change_is_not_used(
    spoil: Callable[[Path], None], folder: Path, tensors: list[Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """The process then has weights of its own."""
    share(tensors)
    spoil(folder)

    with caplog.at_level(logging.INFO):
        found = share(tensors)

    assert {tensor.data_ptr() for tensor in found} == {tensor.data_ptr() for tensor in tensors}
    assert "weights are not shared between processes" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_others_is_not_used(folder: Path, tensors: list[Tensor]) -> None:
    """A folder that somebody else made first, and a file in ours."""
    share(tensors)
    file = next(folder.iterdir())
    for path in (file, folder, folder.parent):
        os.chown(path, 65534, 65534)
        found = share(tensors)
        os.chown(path, os.geteuid(), os.getegid())
        assert {tensor.data_ptr() for tensor in found} == {tensor.data_ptr() for tensor in tensors}
