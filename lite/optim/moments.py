"""Moments: Adam's two running means of a matrix, in fp32, bf16 or eight bits, and the step that they give."""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor, nn

from lite.optim.rounding import by_chance, to_bfloat16

States = Literal["float32", "bfloat16", "8bit"]
BLOCK = 256  # numbers that share a scale in eight bits


class Adam(NamedTuple):
    """Settings of Adam's step; `step` counts from 1.

    Source: Kingma and Ba 2015, arXiv:1412.6980; decay is decoupled (Loshchilov and Hutter 2019, arXiv:1711.05101).
    """

    beta1: float
    beta2: float
    epsilon: float

    def direction(self, first: Tensor, second: Tensor, gradient: Tensor, step: int) -> Tensor:
        """m̂ / (√v̂ + ε), fp32, of moments that are brought up to date in place."""
        first.lerp_(gradient, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        root = second.sqrt().div_((1 - self.beta2**step) ** 0.5).add_(self.epsilon)
        return torch.div(first, root, out=root).div_(1 - self.beta1**step)


class Moments:
    """Both moments of a matrix as they are stored; `read` gives them to work on, `write` puts them back.

    exact: fp32, or fp64 of fp64 weights, which then are stored so.
    """

    def __init__(self, shape: tuple[int, ...], states: States, exact: torch.dtype, device: torch.device) -> None:
        self.shape, self.states, self.exact = shape, states, exact
        count = math.prod(shape)
        self.tensors: dict[str, Tensor] = {}
        for name in ("first", "second"):
            if states == "8bit":
                # What zero is in each map: 127 of the signed, 0 of the unsigned one.
                zero = int(_map(name, "cpu").abs().argmin())
                self.tensors[name] = torch.full(shape, zero, dtype=torch.uint8, device=device)
                self.tensors[f"{name}_scale"] = torch.zeros(-(-count // BLOCK), device=device)
            else:
                dtype = exact if states == "float32" else torch.bfloat16
                self.tensors[name] = torch.zeros(shape, dtype=dtype, device=device)

    def read(self) -> tuple[Tensor, Tensor]:
        """First and second moments in `exact`; where they are stored so, these are the stored ones themselves."""
        return self._read("first"), self._read("second")

    def step(self, adam: Adam, gradient: Tensor, steps: int, generator: torch.Generator | None) -> Tensor:
        """Adam's direction at step `steps`, in `exact`, with the moments brought up to date."""
        first, second = self.read()
        direction = adam.direction(first, second, gradient, steps)
        self.write(first, second, generator)
        return direction

    def write(self, first: Tensor, second: Tensor, generator: torch.Generator | None) -> None:
        """Store both; bf16 and eight bits are rounded stochastically: at β₂ = 0.999 nearest would stand still."""
        for name, value in (("first", first), ("second", second)):
            stored = self.tensors[name]
            if self.states == "float32":
                if value is not stored:
                    stored.copy_(value)
            elif self.states == "bfloat16":
                stored.copy_(to_bfloat16(value.to(torch.float32), generator))
            else:
                codes, scale = _quantised(value.to(torch.float32), _map(name, value.device), generator)
                # The first moment goes down to smaller numbers than the second's root: above a 0 it would fly.
                stored.copy_(codes.view(self.shape).clamp_(min=0 if name == "first" else 1))
                self.tensors[f"{name}_scale"].copy_(scale)

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Copy the stored tensors of other moments of this shape and storage, found in `saved` by name."""
        for name, tensor in self.tensors.items():
            tensor.copy_(saved[name])

    def _read(self, name: str) -> Tensor:
        stored = self.tensors[name]
        if self.states != "8bit":
            return stored.to(self.exact)
        scale, code = self.tensors[f"{name}_scale"], _map(name, stored.device)
        value = torch.ops.bitsandbytes.dequantize_blockwise.default(stored, scale, code, BLOCK, torch.float32)
        return value.to(self.exact)


def _quantised(value: Tensor, values: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Codes (count,) of value / its block's largest, and the largest of each block (blocks,); a neighbour by chance.

    values (256,), ascending: what the codes stand for. bitsandbytes' own quantiser rounds to nearest.
    """
    flat = value.reshape(-1)
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    part = (blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).view(-1)[: len(flat)]
    below = torch.bucketize(part, values, out_int32=True, right=True).sub_(1).clamp_(0, len(values) - 2)
    lower, upper = values.index_select(0, below), values.index_select(0, below + 1)
    chance = part.sub_(lower).div_(upper.sub_(lower))
    return below.add_(by_chance(chance, generator)).to(torch.uint8), scale


_MAPS: dict[tuple[bool, str], Tensor] = {}


def _map(name: str, device: torch.device | str) -> Tensor:
    """The 256 values of a moment's codes: of the second one, which is never negative, without the sign's bit.

    Source: the dynamic maps of Dettmers et al. 2022, arXiv:2110.02861.
    """
    key = name == "first", str(device)
    if key not in _MAPS:
        with torch.device("cpu"):
            _MAPS[key] = create_dynamic_map(signed=key[0]).to(device)
    return _MAPS[key]
