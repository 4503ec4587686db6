"""What computes: a tensor's own device; of a meta tensor, the one that it stands for in a dry run.

A plan runs the real step on meta tensors (`plan/dry_run.py`). Where the step takes another path on a GPU than on a CPU
it asks here, never `tensor.is_cuda`, so that the dry run takes the path of the machine that is planned for.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_stands_for = ["cpu"]


def kind(where: Tensor | torch.device) -> str:
    """`cuda`, `cpu` …: the type of a tensor's device, or of a device; of meta, what it stands for."""
    device = where.device if isinstance(where, Tensor) else where
    return _stands_for[-1] if device.type == "meta" else device.type


@contextmanager
def meta_stands_for(device_type: str) -> Iterator[None]:
    """Within: meta tensors take the paths of a `cuda` or a `cpu` device."""
    _stands_for.append(device_type)
    try:
        yield
    finally:
        _stands_for.pop()
