"""The meter: live bytes of a step, their peak, and what the peak is made of.

A dispatch mode that sees every operator. A storage counts from the operator that first returns it until it dies; views
and in-place results share it and count once. It works alike on meta tensors and on real ones, so that what a plan
predicts can be compared with what a real step does, operator by operator.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lite.memory import marks
from lite.memory.workspace import workspace_bytes

# Operators in place: on meta there is nothing for them to do, and checking their shapes takes longer than all else.
IN_PLACE = frozenset(
    f"aten::{name}_"
    for name in ("add", "addcmul", "addmm", "copy", "div", "exp", "fill", "mul", "neg", "scatter_add", "sub", "zero")
)
CUDA_GRANULE = 512  # bytes: torch's CUDA allocator rounds every tensor up to a multiple


class Meter(TorchDispatchMode):
    """Counts while it is on. A tensor's `part` is what it was held as, else the phase in which it was made."""

    def __init__(self, *, granule: int = 1, words: int | None = None, trace: bool = False) -> None:
        """`granule`: what sizes are rounded up to; `words`: the vocabulary, by which logits are known; `trace`: keep
        (operator, live bytes) after each operator.
        """
        super().__init__()
        self.granule, self.words = granule, words
        self.trace: list[tuple[str, int]] | None = [] if trace else None
        self.phase_now = "idle"
        self.live = {"device": 0, "host": 0}
        self.top = {"device": 0, "host": 0}
        self.peaks: Counter[str] = Counter()  # of each phase, on the device
        self.parts: Counter[str] = Counter()  # live bytes on the device, by part
        self.at_top: Counter[str] = Counter()  # the same at the peak
        self.static: Counter[str] = Counter()  # the same where the step begins
        self.largest: Counter[str] = Counter()  # bytes of the largest tensor that was made, by the part it was made as
        self.phase_at_top = "idle"
        self._known: dict[int, tuple[int, str, str, Any]] = {}

    def phase(self, name: str) -> None:
        """What is made from now on belongs to this phase."""
        self.phase_now = name

    def hold(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors that are there already, or call those that are counted by another name."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._known:
                size, place, old, reference = self._known[key]
                self._known[key] = size, place, part, reference
                if place == "device":
                    self.parts[old] -= size
                    self.parts[part] += size
            else:
                self._add(tensor, part)

    def lies(self, tensor: Tensor) -> str:
        """`device` or `host`; of a tensor that was never seen, `device`."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known[1] if known else "device"

    def begin(self) -> None:
        """Forget peaks and trace: what is live now is what a step starts from."""
        self.top, self.peaks, self.at_top = dict(self.live), Counter(), Counter(self.parts)
        self.static, self.largest = Counter(self.parts), Counter()
        if self.trace is not None:
            self.trace.clear()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = op.name()
        idle = name.partition(".")[0] in IN_PLACE and args[0].is_meta
        out = args[0] if idle else op(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self._add(out, self._part(name, out))
        elif isinstance(out, tuple | list):
            for one in out:
                if isinstance(one, Tensor):
                    self._add(one, self._part(name, one))
        if inside := workspace_bytes(name.split(".")[0], args, kwargs or {}):
            self._touch(inside)
        if self.trace is not None:
            self.trace.append((name, self.live["device"]))
        self.seen(name, args, kwargs or {}, out)
        return out

    def seen(self, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        """An operator has run; for those who count more than bytes."""

    def _part(self, name: str, tensor: Tensor) -> str:
        if name.startswith(("bitsandbytes::dequantize", "lite::four_bits")):
            return "dequantised"
        if self.phase_now == "head" and self.words and tensor.ndim == 2 and tensor.shape[-1] == self.words:
            return "logits"
        return self.phase_now

    def _add(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // self.granule) * self.granule
        place = marks.place()
        self._known[key] = size, place, part, weakref.ref(storage, functools.partial(self._drop, key))
        self.live[place] += size
        if place == "device":
            self.parts[part] += size
            self.largest[part] = max(self.largest[part], size)
            self._touch(0)
        else:
            self.top["host"] = max(self.top["host"], self.live["host"])

    def _touch(self, inside: int) -> None:
        """Note the live bytes, with `inside` of them in an operator, if they are the most so far."""
        now = self.live["device"] + inside
        if now > self.peaks[self.phase_now]:
            self.peaks[self.phase_now] = now
        if now > self.top["device"]:
            self.top["device"] = now
            self.at_top = self.parts.copy()
            self.at_top["workspace"] = inside
            self.phase_at_top = self.phase_now

    def _drop(self, key: int, _: Any) -> None:
        size, place, part, _ = self._known.pop(key)
        self.live[place] -= size
        if place == "device":
            self.parts[part] -= size


def frozen_tensors(model: nn.Module) -> list[Tensor]:
    """Every tensor of a model that is not trained: weights, buffers, and the scales that bitsandbytes keeps beside."""
    found = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, state.state2 if state is not None else None):
            if part is not None:
                found += [part.absmax, part.code]
        if state is not None and state.state2 is not None:
            found.append(state.offset)
    scales = (getattr(getattr(module, "weight", None), "SCB", None) for module in model.modules())
    return found + [scale for scale in scales if scale is not None]
