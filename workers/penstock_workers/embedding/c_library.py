"""Where the compiled library of `kernels*.c` lies, and what a machine is without it. Needs no torch."""

import ctypes
import hashlib
from pathlib import Path
from typing import Final

from penstock_workers.hardware.machine import cpu_flags

FOLDER: Final = Path(__file__).parent
NEEDED: Final = frozenset({"avx2", "fma"})
"""Instruction sets without which no variant runs, in Linux's words."""


def compiled_path() -> Path:
    """Return where the shared library of these sources lies, if it was compiled."""
    sources = sorted([*FOLDER.glob("kernels*.c"), *FOLDER.glob("kernels*.h")])
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    return FOLDER / f"kernels-{digest.hexdigest()[:16]}.so"


def is_for_this_cpu(needs: frozenset[str] = NEEDED) -> bool:
    """Say whether the CPU has the instructions of a variant, or of any."""
    return cpu_flags() >= needs


def missing_reason() -> str | None:
    """Return what this machine is without, and what to do; None where CPU or install lack nothing."""
    if not is_for_this_cpu():
        return None
    try:
        ctypes.CDLL(str(compiled_path()))
    except OSError as error:
        return tell_missing(error)
    return None


def tell_missing(error: OSError) -> str:
    """Say what a machine is without whose CPU could use the library.

    Args:
        error: Why the library cannot be loaded.
    """
    return (
        "embedding takes about 1.4 times as long as this CPU needs: penstock was installed without its C; "
        f"install its wheel for Linux on x86-64, or from source where there is a C compiler ({error})"
    )
