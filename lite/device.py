"""What computes: a tensor's own device; of a meta tensor, the one that it stands for in a dry run.

A plan runs the real step on meta tensors (`plan/dry_run.py`). Where the step takes another path on a GPU than on a CPU
it asks here, never `tensor.is_cuda`, so that the dry run takes the path of the machine that is planned for. Here too
are the one way by which a step's tensors get there, and what is said where there is no room.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# What is said for want of memory, beside torch's own error: by a CPU's allocator, by the driver for what torch does not
# allocate, by Triton where it loads a kernel at its first launch, by cuBLAS that finds no room for its handle.
SAID = ("DefaultCPUAllocator", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory")
SAID += ("CUBLAS_STATUS_ALLOC_FAILED",)

_stands_for = ["cpu"]


def kind(where: Tensor | torch.device) -> str:
    """`cuda`, `cpu` …: the type of a tensor's device, or of a device; of meta, what it stands for."""
    device = where.device if isinstance(where, Tensor) else where
    return _stands_for[-1] if device.type == "meta" else device.type


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; the host does not wait for what was queued there before, nor for the copy.

    To CUDA it goes from pinned memory: what is not, the driver has to copy aside first, and may wait for the device.
    """
    return pinned(tensor, device).to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in host memory that can be sent to `device` at once: on CUDA in pinned memory, else the tensor itself.

    torch keeps freed pinned blocks and gives them out again once the copies that use them are done.
    """
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def out_of_memory(error: BaseException) -> bool:
    """Whether an operator failed for want of memory, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


@contextmanager
def meta_stands_for(device_type: str) -> Iterator[None]:
    """Within: meta tensors take the paths of a `cuda` or a `cpu` device."""
    _stands_for.append(device_type)
    try:
        yield
    finally:
        _stands_for.pop()
