"""The switches by which all sides of a benchmark use no more of this CPU than an earlier kind has.

Each is a variable that a process reads as it starts. ONNX Runtime has none; its products, and those that
OpenVINO takes from it (MLAS), look at the CPU themselves. A peer that still uses more can only be faster for
it. Times are those of this CPU: its clock, caches and number of units stay.
"""

import os
from collections.abc import Mapping
from typing import Final, get_args

from penstock_workers.configuration import CPU_VARIABLE
from penstock_workers.hardware.machine import cpu_flags
from penstock_workers.settings import Cpu

KINDS: Final[tuple[Cpu, ...]] = get_args(Cpu)
NEEDS: Final[Mapping[Cpu, str]] = {
    "avx2": "avx2",
    "avx512": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "amx": "amx_bf16",
}
"""The flag of each kind, in Linux's words."""
_ONEDNN: Final[Mapping[Cpu, str]] = {
    "avx2": "AVX2",
    "avx512": "AVX512_CORE",
    "avx512_bf16": "AVX512_CORE_BF16",
    "amx": "AVX512_CORE_AMX",
}
NOT_LIMITED: Final = "ONNX Runtime, and MLAS in OpenVINO: they have no switch"


def limit_to(kind: Cpu) -> None:
    """Let this process, and those that it starts, use no more than a kind of CPU has.

    Source: oneDNN, "CPU Dispatcher Control", ONEDNN_MAX_CPU_ISA, which OpenVINO's copy reads too; torch,
    aten/src/ATen/native/DispatchStub.cpp, ATEN_CPU_CAPABILITY; oneMKL, "Instruction Set Specific
    Dispatching", MKL_ENABLE_INSTRUCTIONS.

    Raises:
        ValueError: This CPU has less.
    """
    if NEEDS[kind] not in cpu_flags():
        raise ValueError(f"this CPU has no {NEEDS[kind]}")
    is_avx2 = kind == "avx2"
    os.environ |= {
        CPU_VARIABLE: kind,
        "ONEDNN_MAX_CPU_ISA": _ONEDNN[kind],
        "ATEN_CPU_CAPABILITY": "avx2" if is_avx2 else "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2" if is_avx2 else "AVX512",
    }
