"""Weights in eight bits: 128 of them share a scale, and value = (code − 128) / 127 · scale.

Codes are unsigned and the grid is linear, so that bitsandbytes' block-wise kernel dequantises them in one pass; the
plain twin is two lines of torch. Updates are added to the dequantised block and rounded stochastically onto its new
grid: rounded to nearest an 8-bit weight learns nothing, for an update is a hundredth of its step.
"""

import functools

import bitsandbytes  # noqa: F401, its operators
import torch
from torch import Tensor

from lite.kernels.updates import BLOCK
from lite.optim.rounding import Drawn, to_integer_

ZERO, LIMIT = 128, 127  # the code of 0; codes lie in ZERO ± LIMIT
SMALLEST = 1e-36  # of scales


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (the weight's shape, uint8) and scales (blocks,) fp32 of a float weight, rounded to nearest."""
    blocks = _blocks(weight.to(torch.float32))
    scale = _scale(blocks)
    codes = (blocks * _inverse(scale)[:, None]).round_().add_(ZERO).to(torch.uint8)
    return codes.view(-1)[: weight.numel()].view(weight.shape), scale


def dequantised(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes (any shape) with scales (blocks,) stand for, in `dtype`: (code − 128) / 127 · scale."""
    # The function around it gives fp32, or the dtype of what was quantised.
    return torch.ops.bitsandbytes.dequantize_blockwise.default(codes, scale, grid(codes.device), BLOCK, dtype)


def rounded_into_(codes: Tensor, scale: Tensor, exact: Tensor, drawn: Drawn) -> None:
    """Put `exact` (fp32, whole blocks, overwritten) into codes and scales, each block's scale estimated anew."""
    blocks = _blocks(exact)
    found = _scale(blocks)
    blocks.mul_(_inverse(found)[:, None])
    to_integer_(blocks, drawn).clamp_(-LIMIT, LIMIT).add_(ZERO)
    codes.copy_(blocks.view(-1)[: codes.numel()].view(codes.shape))
    scale.copy_(found)


def _blocks(exact: Tensor) -> Tensor:
    flat = exact.reshape(-1)
    if rest := -flat.numel() % BLOCK:
        flat = torch.nn.functional.pad(flat, (0, rest))
    return flat.view(-1, BLOCK)


def _scale(blocks: Tensor) -> Tensor:
    """The largest magnitude of each block; 0 where 127 / it is beyond fp32, as if the block were of zeros."""
    largest = blocks.abs().amax(1)
    return largest.masked_fill_(largest < SMALLEST, 0.0)


def _inverse(scale: Tensor) -> Tensor:
    """127 / scale, and 0 of a block of zeros."""
    return torch.where(scale > 0, LIMIT / scale, 0.0)


@functools.lru_cache(maxsize=8)
def grid(device: torch.device) -> Tensor:
    """The values of all 256 codes for a scale of 1, made once for a device; code 0 is never written."""
    with torch.device("cpu"):
        values = (torch.arange(256, dtype=torch.float32) - ZERO) / LIMIT
    return values.to(device)
