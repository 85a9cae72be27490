"""Weights in an order of our own, in memory that all processes of a machine share.

Each process maps the same file in the user's cache. Its pages are in memory once, like those of a model's
own files.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from penstock.stacks import cache_folder
from penstock_workers.hardware import own_files

logger = logging.getLogger(__name__)

ALIGNED: Final = 64
"""Each tensor begins at a multiple of this many bytes, as in torch's own memory."""
UNUSED_S: Final = 7 * 86_400
"""Seconds after which a file that no process has loaded is removed."""


def share(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of the same contents that are in memory once for all processes.

    Args:
        tensors: Contiguous tensors on the CPU.

    Returns:
        Tensors that must not be written to; `tensors` themselves where there is no place for a file.
    """
    rows = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    sizes = [-(-len(row) // ALIGNED) * ALIGNED for row in rows]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.numpy().data)
    try:
        file = cache_folder() / "weights" / f"{digest.hexdigest()}.bin"
        own_files.make_folder(file.parent)
        parts = _map_or_write(file, rows, sizes)
    except OSError as error:
        logger.info("weights are not shared between processes: %s", error)
        parts = None
    if parts is None:
        return list(tensors)
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _map_or_write(file: Path, rows: Sequence[Tensor], sizes: list[int]) -> list[Tensor] | None:
    """Return the rows from a file, which is written first if it is missing or damaged; None if that fails."""
    parts = _map(file, rows, sizes)
    if parts is not None:
        os.utime(file)
        return parts
    with _alone(file.parent):
        parts = _map(file, rows, sizes)  # another process may have written it in between
        if parts is None:
            _write(file, rows, sizes)
            parts = _map(file, rows, sizes)
        return parts


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from writing: each would map a file of its own, and nothing be shared."""
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _map(file: Path, rows: Sequence[Tensor], sizes: list[int]) -> list[Tensor] | None:
    """Return the rows from a file; None if the file is missing or damaged."""
    size = sum(sizes)
    try:
        with own_files.opened(file) as opened:
            if os.fstat(opened.fileno()).st_size != size:
                return None
            # By its number where there is /proc: the file that was checked is the one that is mapped.
            by_number = Path(f"/proc/self/fd/{opened.fileno()}")
            name = str(by_number if by_number.exists() else file)
            whole = torch.from_file(name, shared=False, size=size, dtype=torch.uint8)
    except FileNotFoundError:
        return None
    mapped = torch.split(whole, sizes)
    found = [part[: len(row)] for row, part in zip(rows, mapped, strict=True)]
    return found if all(map(torch.equal, found, rows)) else None


def _write(file: Path, rows: Sequence[Tensor], sizes: list[int]) -> None:
    for old in file.parent.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > UNUSED_S:
                old.unlink()  # whoever has it mapped keeps it
    if 2 * sum(sizes) > shutil.disk_usage(file.parent).free:
        raise OSError(errno.ENOSPC, "they would take half of what is free", str(file.parent))
    with own_files.replaced(file) as to:
        for row, size in zip(rows, sizes, strict=True):
            to.write(row.numpy().data)
            to.write(bytes(size - len(row)))
