"""Copies between a device and the memory of the process."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device; return at once where that is CUDA."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """Copy from a device; from CUDA to pinned memory, asleep until this thread's stream is done."""
    if not tensor.is_cuda:
        return tensor.cpu()
    found = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    # without the event the CPU would wait in a busy loop
    done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch has no type for it
    done.record(torch.cuda.current_stream(tensor.device))
    done.synchronize()
    return found
