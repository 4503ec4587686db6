"""W ← decay · W + addend by Triton, rounded by chance into bf16 or into blocks of eight bits, in one pass.

Random numbers are Philox 4x32-10 of a seed and a counter, four to a count: number i of those that begin at `first` is
word i mod 4 of count first + i // 4. So they take no memory, and how a matrix is cut does not change them.
Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; as triton.language.randint4x has it.
"""

import triton
import triton.language as tl
from torch import Tensor

from lite.kernels.updates import BLOCK

WEIGHTS = 2048  # to a program
IN_BLOCK = tl.constexpr(BLOCK)
ZERO = tl.constexpr(128.0)
LIMIT = tl.constexpr(127.0)
SMALLEST = tl.constexpr(1e-36)
UNIT = tl.constexpr(2.0**-24)
SETTINGS = {"enable_fp_fusion": False}  # as the plain twin, which rounds the product before the sum


def add_rounded_(weight: Tensor, addend: Tensor, decay: float, seed: int, first: int) -> None:
    """weight bf16, addend fp32 of the same shape, both contiguous."""
    if count := weight.numel():
        _add_rounded[(triton.cdiv(count, WEIGHTS),)](
            weight, addend, count, decay, seed, first, SIZE=WEIGHTS, **SETTINGS
        )


def add_blocks_(codes: Tensor, scale: Tensor, addend: Tensor, decay: float, seed: int, first: int) -> None:
    """codes uint8, scale (blocks,) fp32, addend fp32 of codes' shape, all contiguous."""
    if count := codes.numel():
        blocks = WEIGHTS // IN_BLOCK.value
        _add_blocks[(triton.cdiv(count, WEIGHTS),)](
            codes, scale, addend, count, decay, seed, first, BLOCKS=blocks, **SETTINGS
        )


@triton.jit
def _drawn(seed, first, SIZE: tl.constexpr):
    """(SIZE,) uint32."""
    one, two, three, four = tl.randint4x(seed, first + tl.arange(0, SIZE // 4))
    return tl.join(tl.join(one, three), tl.join(two, four)).reshape(SIZE)


@triton.jit(do_not_specialize=["seed", "first"])
def _add_rounded(weight, addend, count, decay, seed, first, SIZE: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * SIZE
    place = begin + tl.arange(0, SIZE)
    inside = place < count
    exact = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32) * decay
    exact += tl.load(addend + place, mask=inside, other=0.0)
    noise = (_drawn(seed, first + begin // 4, SIZE) >> 16).to(tl.int32)
    # As in lite.optim.rounding: the carry of what bf16 drops is right with the right probability; no NaN gets one.
    bits = exact.to(tl.int32, bitcast=True) + tl.where(exact == exact, noise, 0)
    tl.store(weight + place, (bits & -65536).to(tl.float32, bitcast=True).to(weight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "first"])
def _add_blocks(codes, scale, addend, count, decay, seed, first, BLOCKS: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * BLOCKS
    block = begin + tl.arange(0, BLOCKS)
    place = block[:, None] * IN_BLOCK + tl.arange(0, IN_BLOCK)[None, :]
    inside, whole = place < count, block * IN_BLOCK < count
    step = tl.load(scale + block, mask=whole, other=0.0)
    code = tl.load(codes + place, mask=inside, other=128).to(tl.float32)
    exact = tl.div_rn(code - ZERO, LIMIT) * step[:, None] * decay
    exact += tl.load(addend + place, mask=inside, other=0.0)

    largest = tl.max(tl.abs(exact), 1)
    largest = tl.where(largest < SMALLEST, 0.0, largest)
    inverse = tl.where(largest > 0, tl.div_rn(LIMIT, tl.where(largest > 0, largest, 1.0)), 0.0)
    level = exact * inverse[:, None]
    low = tl.floor(level)
    drawn = _drawn(seed, first + begin * (IN_BLOCK // 4), BLOCKS * IN_BLOCK).reshape(BLOCKS, IN_BLOCK)
    up = (drawn >> 8).to(tl.float32) * UNIT < level - low
    level = tl.minimum(tl.maximum(low + up.to(tl.float32), -LIMIT), LIMIT) + ZERO
    level = tl.where(exact == exact, level, ZERO)
    tl.store(codes + place, level.to(tl.int32).to(tl.uint8), mask=inside)
    # A maximum passes NaNs over, and they must not be lost.
    broken = tl.max((exact != exact).to(tl.int32), 1) > 0
    tl.store(scale + block, tl.where(broken, float("nan"), largest), mask=whole)
