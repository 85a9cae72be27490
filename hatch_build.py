"""Compiles what the embedding engine has in C; without a C compiler the package works, and slower.

A wheel with the library runs on every Linux whose glibc has what the library asks for: its tag names the
oldest. `HATCH_BUILD_NO_HOOKS=true` builds the wheel of all other machines, without the library.
"""

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("workers/penstock_workers/embedding")
FLAGS: Final = ("-O3", "-fPIC", "-fvisibility=hidden")
_BFLOAT16: Final = ("kernels_bfloat16.c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16")
VARIANTS: Final[Mapping[str, tuple[str, ...]]] = {
    "avx2": ("kernels_float32.c", "-mavx2", "-mfma"),
    "avx512": ("kernels_float32.c", "-mavx512f", "-mfma"),
    "avx512_bf16": _BFLOAT16,
    "amx": (*_BFLOAT16, "-mamx-tile", "-mamx-bf16", "-DTILES"),
    # for tests alone: what is laid out for tiles, on CPUs that have none
    "tiles_in_c": (*_BFLOAT16, "-DTILES", "-DTILES_IN_C"),
}
"""Of the encoder, one for each kind of CPU: its source, and its own flags."""
OLDEST_GLIBC = (2, 17)
"""The glibc of manylinux2014, the oldest that the libraries of a worker still have wheels for."""


class KernelsHook(BuildHookInterface[Any]):
    """Puts the shared library beside its source, and into wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002  # its interface
        """Compile what a wheel, or an editable install, is to have."""
        if self.target_name != "wheel" or sysconfig.get_platform() != "linux-x86_64":
            return
        folder = Path(self.root) / FOLDER
        library = folder / f"kernels-{_digest(folder)}.so"
        draft = library.with_suffix(".draft")
        reasons: list[str] = []
        with tempfile.TemporaryDirectory() as objects:
            compiled = [f for name in VARIANTS if (f := _compile(folder, name, Path(objects), reasons))]
            is_linked = bool(compiled) and _run(["-shared", "-o", str(draft), *map(str, compiled)], reasons)
        if not is_linked:
            self.app.display_warning(
                f"the kernels are not compiled: {reasons[-1]}\n"
                "Workers run without them, and embed at 0.7 of the speed where the CPU has AVX-512 BF16. "
                "A wheel for Linux on x86-64 has them compiled; with a C compiler (gcc, or another cc), "
                "an install from source has them too."
            )
            return
        for reason in reasons:
            self.app.display_warning(f"kernels for one kind of CPU are not compiled: {reason}")
        for old in folder.glob("kernels-*.so"):
            old.unlink()
        draft.replace(library)
        build_data["artifacts"].append(f"/{FOLDER}/{library.name}")
        build_data |= {"pure_python": False, "tag": f"py3-none-{platform_tag(library.read_bytes())}"}


def _digest(folder: Path) -> str:
    """Return the hash that `penstock_workers.embedding.c_library` looks for."""
    sources = sorted([*folder.glob("kernels*.c"), *folder.glob("kernels*.h")])
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def _compile(folder: Path, variant: str, objects: Path, reasons: list[str]) -> Path | None:
    """Compile one variant; None if the compiler does not know its CPU, or there is none."""
    source, *flags = VARIANTS[variant]
    file = objects / f"{variant}.o"
    names = (f"-DVARIANT={variant}", "-c", "-o", str(file), str(folder / source))
    return file if _run([*FLAGS, *flags, *names], reasons) else None


def _run(arguments: list[str], reasons: list[str]) -> bool:
    """Run the C compiler; adds to `reasons` what it says if it fails."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    try:
        subprocess.run([*compiler, *arguments], check=True, capture_output=True, text=True)  # noqa: S603  # our own source
    except (OSError, subprocess.CalledProcessError) as error:
        reasons.append(str(getattr(error, "stderr", None) or error))
        return False
    return True


def platform_tag(library: bytes) -> str:
    """Return the tag of the machines that a shared library of x86-64 runs on.

    Args:
        library: The library; it has the names of glibc's versions that it asks for, such as GLIBC_2.2.5.

    Source: PEP 600, Future 'manylinux' Platform Tags.
    """
    if platform.libc_ver()[0] != "glibc":
        return "linux_x86_64"  # another C library, which promises nothing of the kind
    versions = re.findall(rb"GLIBC_(\d+)\.(\d+)", library)
    major, minor = max([OLDEST_GLIBC, *((int(major), int(minor)) for major, minor in versions)])
    return f"manylinux_{major}_{minor}_x86_64"
