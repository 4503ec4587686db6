"""Moments: Adam's two running means of a matrix, in fp32, bf16 or eight bits, and the step that they give."""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor

from lite.optim.rounding import to_bfloat16

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

    def write(self, first: Tensor, second: Tensor, generator: torch.Generator | None) -> None:
        """Store both (overwritten). bf16 is rounded stochastically: at β₂ = 0.999 nearest would stand still."""
        for name, value in (("first", first), ("second", second)):
            stored = self.tensors[name]
            if self.states == "float32":
                if value is not stored:
                    stored.copy_(value)
            elif self.states == "bfloat16":
                stored.copy_(to_bfloat16(value.to(torch.float32), generator))
            else:
                codes, scale = _quantised(value.to(torch.float32), _map(name, value.device))
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


SMALL = 1e-4  # of a block's largest: below, bitsandbytes 0.50.2 has no codes on a CPU, and makes of a zero 2e-5


def _quantised(value: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of `code`'s values to each number beside its block's largest, flat or as it was, and the largest."""
    codes, scale = torch.ops.bitsandbytes.quantize_blockwise.default(value, code, BLOCK)
    if value.device.type == "cpu":
        # A moment of nothing would otherwise grow, and all with the same sign.
        flat = value.view(-1)
        small = (flat.abs() < SMALL * scale.repeat_interleave(BLOCK)[: len(flat)]).nonzero()[:, 0]
        part = flat[small] / scale[small // BLOCK]
        codes.view(-1)[small] = torch.bucketize(part, (code[1:] + code[:-1]) / 2, out_int32=True).to(torch.uint8)
    return codes, scale


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
