"""The operators `lite::add_rounded_` and `lite::add_blocks_`: a weight's update and its stochastic rounding at once.

Who calls them asks `operators.at_hand(addend)` first; the plain twins are lite.optim.rounding and lite.optim.blocks.
"""

import torch
from torch import Tensor

BLOCK = 128  # weights in eight bits to a scale

_library = torch.library.Library("lite", "FRAGMENT")
# What is overwritten is returned as well: so it counts as read and as written.
_library.define(
    "add_rounded_(Tensor(a!) weight, Tensor addend, float decay, int seed, int first) -> Tensor(a!)",
)
_library.define(
    "add_blocks_(Tensor(a!) codes, Tensor(b!) scale, Tensor addend, float decay, int seed, int first)"
    " -> (Tensor(a!), Tensor(b!))",
)


def add_rounded_(weight: Tensor, addend: Tensor, decay: float, *, seed: int, first: int) -> None:
    """weight ← decay · weight + addend in fp32, each number rounded up or down so that its expectation is right.

    weight bf16, addend fp32 of its shape. Numbers of one seed that begin at other counts `first` are independent of
    each other as long as the weights, four to a count, do not overlap.
    """
    assert weight.dtype == torch.bfloat16, f"weight in {weight.dtype}"
    _require(weight, addend)
    torch.ops.lite.add_rounded_.default(weight, addend, decay, seed, first)


def add_blocks_(codes: Tensor, scale: Tensor, addend: Tensor, decay: float, *, seed: int, first: int) -> None:
    """The same of codes (uint8) that begin with a block, and scale (blocks,) fp32, which is estimated anew.

    A block with a NaN gets it for a scale.
    """
    assert codes.dtype == torch.uint8, f"codes in {codes.dtype}"
    assert scale.numel() == -(-codes.numel() // BLOCK), f"{scale.numel()} scales of {codes.numel()} codes"
    assert scale.is_contiguous(), f"scales' strides {scale.stride()}"
    _require(codes, addend)
    torch.ops.lite.add_blocks_.default(codes, scale, addend, decay, seed, first)


def _require(weight: Tensor, addend: Tensor) -> None:
    assert addend.dtype == torch.float32, f"addend in {addend.dtype}"
    assert addend.shape == weight.shape, f"addend {tuple(addend.shape)}, weight {tuple(weight.shape)}"
    assert weight.is_contiguous(), f"strides {weight.stride()}"
    assert addend.is_contiguous(), f"addend's strides {addend.stride()}"


def _add_rounded(weight: Tensor, addend: Tensor, decay: float, seed: int, first: int) -> Tensor:
    from lite.kernels import rounded

    with torch.cuda.device_of(weight):
        rounded.add_rounded_(weight, addend, decay, seed, first)
    return weight


def _add_blocks(
    codes: Tensor, scale: Tensor, addend: Tensor, decay: float, seed: int, first: int
) -> tuple[Tensor, Tensor]:
    from lite.kernels import rounded

    with torch.cuda.device_of(codes):
        rounded.add_blocks_(codes, scale, addend, decay, seed, first)
    return codes, scale


for _device in ("CUDA", "CPU"):
    _library.impl("add_rounded_", _add_rounded, _device)
    _library.impl("add_blocks_", _add_blocks, _device)
_library.impl("add_rounded_", lambda weight, addend, decay, seed, first: weight, "Meta")
_library.impl("add_blocks_", lambda codes, scale, addend, decay, seed, first: (codes, scale), "Meta")
