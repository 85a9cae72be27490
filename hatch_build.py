"""Compiles what the embedding engine has in C; without a C compiler the package works, and slower."""

import hashlib
import platform
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("workers/penstock_workers/embedding")
FLAGS = ("-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-shared", "-fPIC")


class KernelsHook(BuildHookInterface[Any]):
    """Puts the shared library beside its source, and into wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002  # its interface
        """Compile what a wheel, or an editable install, is to have."""
        if self.target_name != "wheel" or platform.machine() not in ("x86_64", "AMD64"):
            return
        source = Path(self.root) / FOLDER / "kernels.c"
        library = source.with_name(f"kernels-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so")
        compiler = (sysconfig.get_config_var("CC") or "cc").split()
        draft = library.with_suffix(".draft")
        try:
            command = [*compiler, *FLAGS, "-o", str(draft), str(source)]
            subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603  # our own source
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            self.app.display_warning(f"{source.name} is not compiled, torch will compute: {reason}")
            return
        for old in source.parent.glob("kernels-*.so"):
            old.unlink()
        draft.replace(library)
        build_data["artifacts"].append(f"/{FOLDER}/{library.name}")
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data |= {"pure_python": False, "tag": f"py3-none-{tag}"}
