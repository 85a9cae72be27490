"""Folders that a worker process writes to, and a start without them."""

import logging
import os
import tempfile
from typing import Final

from penstock.stacks import cache_folder
from penstock_workers.hardware import own_files

logger = logging.getLogger(__name__)

_TORCH_CACHE: Final = "TORCHINDUCTOR_CACHE_DIR"


def settle_folders() -> None:
    """Let models load where no folder can be written, as in a read-only container; logs what that costs.

    Call it before torch is imported.
    """
    troubles = []
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        # torch wants a cache folder when it is imported. We compile nothing, so a folder that exists is
        # enough. Source: torch's `_inductor/runtime/cache_dir_utils.py`.
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
