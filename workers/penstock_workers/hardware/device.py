"""Which hardware a pool runs on, and in which number format."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal

import torch

from penstock.errors import ModelLoadError
from penstock.request import PoolName
from penstock_workers.hardware import machine
from penstock_workers.hardware.machine import cpu_flags
from penstock_workers.settings import Dtype

DeviceName = Literal["auto", "cuda", "mps", "cpu"]

GPU_SWITCH_S: Final = 0.0005
"""Seconds after which a thread lets another have the interpreter, beside a GPU; Python's default is 5 ms."""
_of_thread = threading.local()


def choose_device(pool: PoolName, wanted: DeviceName) -> torch.device:
    """Return the device of a pool.

    Raises:
        ModelLoadError: The pool wants an accelerator, and this machine has none.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if wanted in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    looked_for = {"auto": "neither CUDA nor MPS", "cuda": "no CUDA", "mps": "no MPS"}[wanted]
    raise ModelLoadError(
        f"pool {pool}", f'{looked_for} device is there; set pools.{pool}.device = "cpu" to try without one'
    )


def share_cores(n_threads: int, device: torch.device) -> None:
    """Give torch this many threads, beside a GPU one: by default it takes every core, in every process.

    Beside a GPU Python's threads take shorter turns: the model's thread gives its turn up at each kernel.
    """
    torch.set_num_threads(n_threads if device.type == "cpu" else 1)
    torch.set_num_interop_threads(1)
    if device.type != "cpu":
        sys.setswitchinterval(GPU_SWITCH_S)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Compute in a CUDA stream of this thread: its copies run beside the kernels of other threads.

    Source: docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA streams".
    """
    if device.type != "cuda":
        yield
        return
    if not hasattr(_of_thread, "stream"):
        _of_thread.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no type for it
    _of_thread.stream.wait_stream(torch.cuda.current_stream(device))  # which wrote the weights
    with torch.cuda.stream(_of_thread.stream):
        yield


def has_fast_bfloat16(device: torch.device) -> bool:
    """Tell whether the hardware itself computes matrix products in bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # AVX-512 BF16 or AMX. Without either, oneDNN converts to float32 and computes there.
    return device.type == "cpu" and bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def torch_dtype(name: Dtype) -> torch.dtype:
    """Return torch's dtype of that name; `auto` is float32 until an engine finds a faster one."""
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return formats.get(name, torch.float32)


def free_bytes(device: torch.device) -> int:
    """Return how much memory of a device this process can take now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return machine.free_bytes()


def name_device(device: torch.device) -> str:
    """Return the name of the hardware, by which measurements are compared."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
