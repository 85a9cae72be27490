"""Folders that a process would like to write to, and what it is without them."""

import logging
import os
import tempfile
from typing import Final

from penstock.stacks import cache_folder
from penstock_workers.hardware import own_files

logger = logging.getLogger(__name__)

_TORCH_CACHE: Final = "TORCHINDUCTOR_CACHE_DIR"


def settle_folders() -> None:
    """Let models load where nothing can be written, as in a read-only container; one line says what it costs.

    To be called before torch is imported.
    """
    troubles = []
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        # Source: torch's `_inductor/runtime/cache_dir_utils.py`, which wants a folder when it is imported.
        # Nothing is compiled here, so one that exists is enough.
        os.environ.setdefault(_TORCH_CACHE, os.sep)
        troubles.append("no folder takes temporary files")
    try:
        own_files.make_folder(folder := cache_folder() / "measured")
        if not os.access(folder, os.W_OK):
            troubles.append(f"{folder} cannot be written")
    except OSError as error:
        troubles.append(f"{error.filename or 'no cache'}: {error.strerror}")
    if troubles:
        logger.warning(
            "%s: starts take longer, and processes share no weights in memory", "; ".join(troubles)
        )
