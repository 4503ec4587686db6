"""AdamW with states in eight bits, by a few kernels a step however many parameters there are.

bitsandbytes' own starts a kernel for each parameter, with much Python around it, and waits for the GPU after each: of
672 matrices of an adapter. But states are kept by blocks of 256 numbers that know nothing of each other. So here those
of many parameters lie side by side, each from the beginning of a block, and weights and gradients are copied together
for the update. No block has numbers of two parameters, and each of them becomes, bit for bit, what bitsandbytes would
have made of it alone.

Outside of a step weights and gradients stay where they are: a gradient that did not arise is told from one of zeros,
nothing is added to what memory holds in backward, and whoever puts another tensor into `.data` or `.grad` is heeded.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import optimizer_update_8bit_blockwise
from torch import Tensor

from lite.device import kind

BLOCK = 256  # numbers that share a scale in the states of bitsandbytes' optimizers
SMALLEST = 4096  # numbers: the states of what is smaller are in fp32
ZERO = 127  # the code of 0 in state1; in state2 it is 0
CHUNK = 2**20  # numbers that are updated at once: their states in fp32 stay in a CPU's cache
CHUNK_ON_CUDA = 16 * 2**20  # a few launches for as many numbers, of which weights and gradients are copied: 128 MiB


class FlatAdamW8bit(bitsandbytes.optim.AdamW8bit):
    """bitsandbytes' AdamW8bit with few launches and no waiting for the device: its results and its `state_dict`.

    Parameters of at least SMALLEST numbers are updated together. Of smaller ones the states are in fp32, and each is
    updated alone, as there. One without a gradient is passed over: its weight, its states and its count of steps stay.
    """

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        """As AdamW8bit: parameters or groups of them; lr, betas, eps, weight_decay."""
        self._chunks: list[_Chunk] = []
        super().__init__(params, **settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in another group of parameters."""
        super().add_param_group(param_group)
        self._chunks += _chunks(len(self.param_groups) - 1, self.param_groups[-1]["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None, "gradients are there already"
        for chunk in self._chunks:
            for part in self._parts(chunk):
                self._update(chunk, part)
        for index, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None and parameter.numel() < SMALLEST:
                    if not self.state[parameter]:
                        self.init_state(group, parameter, index, place)
                    self.update_step(group, parameter, index, place)

    def state_dict(self) -> dict[str, Any]:
        """As AdamW8bit has it: each parameter's states by themselves, or whoever saves one would save all."""
        found = super().state_dict()
        return {**found, "state": _apart(found["state"])}

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Take over the state of such an optimizer, or of an AdamW8bit, over the same parameters, by copying."""
        super().load_state_dict(state_dict, move_to_device)
        for chunk in self._chunks:
            chunk.states.clear()
            for slot in chunk.slots:
                if loaded := self.state.get(slot.parameter):
                    assert loaded["state1"].dtype == torch.uint8, f"states in {loaded['state1'].dtype}"
                    state = self.state[slot.parameter] = chunk.state_of(slot, self.name2qmap)
                    state["step"] = loaded["step"]
                    for name in ("state1", "state2", "absmax1", "absmax2"):
                        state[name].copy_(loaded[name])

    def _parts(self, chunk: "_Chunk") -> "list[list[_Slot]]":
        """Neighbours that have gradients and have taken as many steps; nearly always all of them are."""
        found: list[list[_Slot]] = []
        before = None
        for slot in chunk.slots:
            steps = None
            if slot.parameter.grad is not None:
                if not self.state[slot.parameter]:
                    self.state[slot.parameter] = chunk.state_of(slot, self.name2qmap)
                steps = self.state[slot.parameter]["step"]
                if steps != before:
                    found.append([])
                found[-1].append(slot)
            before = steps
        return found

    def _update(self, chunk: "_Chunk", part: "list[_Slot]") -> None:
        parameters = [slot.parameter for slot in part]
        start, stop = part[0].start, part[-1].stop
        alone = len(part) == 1 and all(t.is_contiguous() for t in (parameters[0], parameters[0].grad))
        if alone:
            weights, gradients = parameters[0].view(-1), parameters[0].grad.view(-1)
        else:
            stop = part[-1].end
            weights, gradients = chunk.room(start, stop)
            places = [slice(slot.start - start, slot.stop - start) for slot in part]
            copied, taken = (
                [flat[place].view(p.shape) for place, p in zip(places, parameters, strict=True)]
                for flat in (weights, gradients)
            )
            torch._foreach_copy_(copied, parameters)
            torch._foreach_copy_(taken, [p.grad for p in parameters])
        for parameter in parameters:
            self.state[parameter]["step"] += 1
        group, states = self.param_groups[chunk.group], chunk.part(start, stop)
        optimizer_update_8bit_blockwise(
            self.optimizer_name,
            gradients,
            weights,
            states["state1"],
            states["state2"],
            *group["betas"],
            0.0,  # beta3 and alpha, of another optimizer
            0.0,
            group["eps"],
            self.state[parameters[0]]["step"],
            group["lr"],
            states["qmap1"],
            states["qmap2"],
            states["absmax1"],
            states["absmax2"],
            group["weight_decay"],
        )
        if not alone:
            torch._foreach_copy_(parameters, copied)


@dataclass(frozen=True)
class _Slot:
    """Where a parameter's states lie among those of its chunk: [start, stop), filled up to `end`, whole blocks."""

    parameter: Tensor
    start: int
    stop: int
    end: int


@dataclass(frozen=True)
class _Chunk:
    """Parameters of a group that are updated together, of one device and dtype, and their states side by side."""

    group: int
    slots: list[_Slot]
    states: dict[str, Tensor] = field(default_factory=dict)  # from the first step on

    def state_of(self, slot: _Slot, books: dict[str, Tensor]) -> dict[str, Any]:
        """A parameter's state before its first step, its tensors parts of the chunk's; books: bitsandbytes' codes."""
        device, size = slot.parameter.device, self.slots[-1].end
        if not self.states:
            numbers, blocks = {"dtype": torch.uint8, "device": device}, {"device": device}
            self.states["state1"] = torch.full((size,), ZERO, **numbers)
            self.states["state2"] = torch.zeros(size, **numbers)
            for name in ("absmax1", "absmax2"):
                self.states[name] = torch.zeros(size // BLOCK, dtype=torch.float32, **blocks)
            books |= {name: book.to(device) for name, book in books.items()}  # once, for all chunks
            self.states["qmap1"], self.states["qmap2"] = books["dynamic"], books["udynamic"]
            if padding := [torch.arange(s.stop, s.end, device=device) for s in self.slots if s.stop < s.end]:
                self.states["padding"] = torch.cat(padding)
        state = self.part(slot.start, slot.stop)
        shaped = {name: state[name].view(slot.parameter.shape) for name in ("state1", "state2")}
        return {"step": 0, **state, **shaped}

    def part(self, start: int, stop: int) -> dict[str, Tensor]:
        """The states of numbers [start, stop), which begin with a block."""
        numbers, blocks = slice(start, stop), slice(start // BLOCK, -(-stop // BLOCK))
        cut = {"state1": numbers, "state2": numbers, "absmax1": blocks, "absmax2": blocks}
        books = {name: self.states[name] for name in ("qmap1", "qmap2")}
        return {name: self.states[name][place] for name, place in cut.items()} | books

    def room(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """For weights and gradients of numbers [start, stop). What fills up blocks is zero and was always zero.

        For on a CPU bitsandbytes stores a zero as 1e-6 of its block's largest, which another block would not have.
        """
        weights = self.slots[0].parameter.new_empty(stop - start)
        if "padding" not in self.states:
            return weights, torch.empty_like(weights)
        self.states["state1"].index_fill_(0, self.states["padding"], ZERO)
        self.states["state2"].index_fill_(0, self.states["padding"], 0)
        return weights, torch.zeros_like(weights)


def _chunks(group: int, parameters: Iterable[Tensor]) -> list[_Chunk]:
    """Those of a group that are kept in eight bits, in their order, in chunks: what is larger than one has its own."""
    chunks: list[_Chunk] = []
    open_chunks: dict[tuple[torch.device, torch.dtype], _Chunk] = {}
    for parameter in parameters:
        size = parameter.numel()
        if size < SMALLEST:
            continue
        most = CHUNK_ON_CUDA if kind(parameter) == "cuda" else CHUNK
        chunk = open_chunks.get((parameter.device, parameter.dtype))
        if chunk is None or chunk.slots[-1].end + size > most:
            chunk = open_chunks[parameter.device, parameter.dtype] = _Chunk(group, [])
            chunks.append(chunk)
        start = chunk.slots[-1].end if chunk.slots else 0
        chunk.slots.append(_Slot(parameter, start, start + size, start + -(-size // BLOCK) * BLOCK))
    return chunks


def _apart(state: dict[Any, Any]) -> dict[Any, Any]:
    """A copy in which no tensor is a part of another; the code books are shared by all anyway."""
    copied = {}
    for name, value in state.items():
        if isinstance(value, dict):
            copied[name] = _apart(value)
        else:
            copied[name] = value.clone() if name in ("state1", "state2", "absmax1", "absmax2") else value
    return copied
