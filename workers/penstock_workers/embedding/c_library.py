"""Where the compiled library of `kernels.c` lies, and what a machine is without it. Needs no torch."""

import ctypes
import hashlib
from pathlib import Path
from typing import Final

from penstock_workers.hardware.machine import cpu_flags

SOURCE: Final = Path(__file__).with_name("kernels.c")
_NEEDED: Final = {"avx512bw", "avx512vl", "avx512_bf16"}


def compiled_path() -> Path:
    """Return where the shared library of this source lies, if it was compiled."""
    return SOURCE.with_name(f"kernels-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so")


def is_for_this_cpu() -> bool:
    """Say whether the CPU has the instructions of the source."""
    return cpu_flags() >= _NEEDED


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
