"""Host memory and the way there: buffers that copies can reach beside the computation, and lanes for those copies.

On CUDA a copy from or to pinned memory runs beside kernels, on a stream of its own. Nothing here waits on the host:
streams wait for each other. On a CPU and on meta the same buffers are made and the same copies run, at once and in the
same order, so that live bytes and results are those of a GPU.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lite.errors import ModelError
from lite.memory import marks

Arrival = torch.cuda.Event | None  # None: the copy is done already


def passing(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor in host memory for a while, for copies from and to `device`; pinned if that is a CUDA device.

    torch keeps freed pinned blocks and gives them out again once the copies that use them are done, so that packs and
    steps share them. Its blocks are powers of two: up to twice the bytes are really taken.
    """
    with marks.on_host():
        if device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def lasting(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same for as long as the model lives: pinned where it lies, with no byte more than it needs.

    Raises ModelError if the system does not let so much memory be pinned.
    """
    with marks.on_host():
        buffer = torch.empty(shape, dtype=dtype, device=device if device.type == "meta" else "cpu")
    if device.type == "cuda" and buffer.nbytes:
        cuda, address = torch.cuda.cudart(), buffer.data_ptr()
        if (code := int(cuda.cudaHostRegister(address, buffer.nbytes, 0))) != 0:
            raise ModelError(
                f"{buffer.nbytes / 2**30:.2f} GiB of host memory cannot be pinned (CUDA error {code}). Expected that "
                "much free memory and a limit that allows it (`ulimit -l`, a container's memory limit). Keep fewer "
                "layers on the host."
            )
        # Of the storage, which views share: the pages must stay pinned for as long as any copy can read them.
        weakref.finalize(buffer.untyped_storage(), cuda.cudaHostUnregister, address).atexit = False
    return buffer


def keep(module: nn.Module, tensors: list[Tensor]) -> None:
    """Note that these tensors of a module lie in host memory."""
    module._on_host = tensors


def host_tensors(model: nn.Module) -> list[Tensor]:
    """All of a model that levers have put into host memory. On a CPU and on meta nothing else tells."""
    return [tensor for module in model.modules() for tensor in getattr(module, "_on_host", ())]


class Lane:
    """Copies that run in their order beside the computation."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    @torch.no_grad()
    def copy(self, target: Tensor, source: Tensor) -> Arrival:
        """Start to copy after all that the current stream has queued so far; `target` may be read after `wait`.

        Who calls keeps both alive until then, for the allocator does not know of this stream. (`record_stream` would
        tell it, but it then holds memory back whenever the host runs ahead of the device, which is always.)
        """
        device = target.device if target.device.type == "cuda" else source.device
        if device.type != "cuda":
            target.copy_(source)
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()


def wait(arrival: Arrival) -> None:
    """Let the current stream, not the host, wait for a copy."""
    if arrival is not None:
        arrival.wait()
