"""Checkpoint offload: the input that a recomputed layer keeps for backward waits in host memory.

The way out runs beside the layer's own forward, the way back beside the recompute and backward of the layer behind it:
while a layer computes in backward, the input of the one before it comes in. So at most two inputs are on the device.
Same gradients, bit for bit: values are only copied.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lite.memory.host import Arrival, Lane, passing, wait


class Away:
    """A layer's input in host memory, until the graph that needs it is gone."""

    def __init__(self, index: int, host: Tensor, device: torch.device, before: "weakref.ref[Away] | None") -> None:
        self.index, self.host, self.device, self.before = index, host, device, before


class Offload:
    """The layers' inputs of one model, on their way out and back."""

    def __init__(self) -> None:
        self._out, self._back = Lane(), Lane()
        self._last: weakref.ref[Away] | None = None
        # What is on its way back. Held here, for if backward stops halfway its copy may still be running.
        self._coming: tuple[Away, Tensor, Arrival] | None = None

    def run(self, index: int, again: Callable[..., Any], function: Callable[..., Any], x: Tensor, *args: Any) -> Any:
        """again(function, x, *args), which checkpoints layer `index`; its input x (B, T, D) is kept on the host.

        checkpoint's own hooks lie within these, so that of all that is saved only its arguments get here; what the
        layers share, such as rotary tables, comes by keyword and is not even among those.
        """
        storage, arrivals = x.untyped_storage()._cdata, []

        def pack(tensor: Tensor) -> Tensor | Away:
            if tensor.untyped_storage()._cdata != storage:
                return tensor
            away, arrival = self._send(index, tensor)
            arrivals.append(arrival)
            return away

        with saved_tensors_hooks(pack, self._unpack):
            try:
                return again(function, x, *args)
            finally:
                # After the layer, which took longer: from here on x's memory may be used again.
                for arrival in arrivals:
                    wait(arrival)

    def _send(self, index: int, x: Tensor) -> tuple[Away, Arrival]:
        self._settle()
        before = self._last and self._last()
        follows = before is not None and before.index == index - 1
        host = passing(x.shape, x.dtype, x.device)
        away = Away(index, host, x.device, self._last if follows else None)
        self._last = weakref.ref(away)
        return away, self._out.copy(host, x)

    def _unpack(self, kept: Tensor | Away) -> Tensor:
        if not isinstance(kept, Away):
            return kept
        if self._coming is None or self._coming[0] is not kept:
            self._start(kept)
        _, x, arrival = self._coming
        self._coming = None
        wait(arrival)
        if (before := kept.before and kept.before()) is not None:
            self._start(before)
        return x

    def _start(self, away: Away) -> None:
        self._settle()
        x = torch.empty(away.host.shape, dtype=away.host.dtype, device=away.device)
        self._coming = away, x, self._back.copy(x, away.host)

    def _settle(self) -> None:
        """Let go of an input that came back and was never asked for, after its copy."""
        if self._coming is not None:
            wait(self._coming[2])
            self._coming = None
