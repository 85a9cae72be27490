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
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("workers/penstock_workers/embedding")
FLAGS = ("-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-shared", "-fPIC")
OLDEST_GLIBC = (2, 17)
"""The glibc of manylinux2014, the oldest that the libraries of a worker still have wheels for."""


class KernelsHook(BuildHookInterface[Any]):
    """Puts the shared library beside its source, and into wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002  # its interface
        """Compile what a wheel, or an editable install, is to have."""
        if self.target_name != "wheel" or sysconfig.get_platform() != "linux-x86_64":
            return
        source = Path(self.root) / FOLDER / "kernels.c"
        library = source.with_name(f"kernels-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so")
        compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
        draft = library.with_suffix(".draft")
        try:
            command = [*compiler, *FLAGS, "-o", str(draft), str(source)]
            subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603  # our own source
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            self.app.display_warning(
                f"{source.name} is not compiled: {reason}\n"
                "Workers run without it, and embed at 0.7 of the speed where the CPU has AVX-512 BF16. "
                "A wheel for Linux on x86-64 has it compiled; with a C compiler (gcc, or another cc), "
                "an install from source has it too."
            )
            return
        for old in source.parent.glob("kernels-*.so"):
            old.unlink()
        draft.replace(library)
        build_data["artifacts"].append(f"/{FOLDER}/{library.name}")
        build_data |= {"pure_python": False, "tag": f"py3-none-{platform_tag(library.read_bytes())}"}


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
