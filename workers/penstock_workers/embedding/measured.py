"""Which way computed a model fastest on this machine, kept for the next start.

Only speed is kept, never whether a way is right: each load compares the chosen way with the model's own
vectors.
"""

import hashlib
import json
import logging
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from penstock.stacks import cache_folder
from penstock_workers.hardware import own_files
from penstock_workers.hardware.machine import cpu_limit, cpu_name

logger = logging.getLogger(__name__)

KEPT_S: Final = 7 * 86_400
"""Seconds for which a measurement counts: the machine may have been busy when it was made."""
_PACKAGES: Final = ("penstock", "torch", "transformers", "openvino")


def machine_key(fingerprint: str, device: str, n_threads: int, code: str) -> str:
    """Return the key of a choice: another model, CPU, GPU, number of threads or version has another key.

    Args:
        fingerprint: Hash of the model's weights and settings.
        device: Name of the device, see `name_device`.
        n_threads: Number of torch's threads.
        code: Name of our own code that computes, where it may be missing.
    """
    parts = (
        fingerprint,
        device,
        n_threads,
        code,
        platform.machine(),
        cpu_name(),
        cpu_limit(),
        *map(_version, _PACKAGES),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def recall(key: str) -> dict[str, str]:
    """Return what was chosen in the last week; empty if nothing was, or if it cannot be read."""
    try:
        with own_files.opened(_file(key)) as opened:
            kept = json.loads(opened.read())
        if time.time() - kept["at"] < KEPT_S:
            return {str(name): str(choice) for name, choice in kept["choices"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return {}


def remember(key: str, choices: dict[str, str]) -> None:
    """Keep what was chosen, if there is a folder for it."""
    try:
        file = _file(key)
        own_files.make_folder(file.parent)
        with own_files.replaced(file) as opened:
            opened.write(json.dumps({"at": time.time(), "choices": choices}).encode())
    except OSError as error:
        logger.info("what was measured is not kept: %s", error)


def _file(key: str) -> Path:
    return cache_folder() / "measured" / f"{key}.json"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
