"""Files that are kept for the next start: made for this user alone, and trusted from nobody else."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, cast

from penstock.identity import process_token

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def make_folder(folder: Path) -> None:
    """Make a folder in our own part of a cache, and that part, for this user alone.

    Raises:
        OSError: One of both is a link, belongs to another user, or can be written by others.
    """
    for each in (folder.parent, folder):
        each.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = each.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "no folder", str(each))
        _check(each, found)


def opened(file: Path) -> BinaryIO:
    """Open a file of ours to read it.

    Raises:
        OSError: The file is missing, is a link, belongs to another user, or can be written by others.
    """
    number = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "no file", str(file))
        _check(file, found)
        return cast(BinaryIO, os.fdopen(number, "rb"))
    except BaseException:
        os.close(number)
        raise


@contextmanager
def replaced(file: Path) -> Iterator[BinaryIO]:
    """Make a file of what the block writes, for this user alone; an older file stays until the block ends.

    The file is there whole or not at all: the processes of a machine start together.

    Raises:
        OSError: The file cannot be made.
    """
    draft = file.with_suffix(f".{process_token()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    number = os.open(draft, flags, 0o600)
    try:
        with os.fdopen(number, "wb") as writer:
            yield writer
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _check(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to somebody else", str(path))
    if found.st_mode & _OTHERS_WRITE:
        raise PermissionError(errno.EPERM, "others may write to it", str(path))
