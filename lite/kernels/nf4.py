"""NF4 weights dequantised by Triton in one pass, scales that are quantised themselves included.

Two weights lie in a byte, the first in its high half: value = code[half] · scale. A scale of `BLOCK` weights is a
number, or code2[byte] · absmax2 + offset, of which 256 share an absmax2. All in fp32, the product and the sum rounded
one after the other, and each weight once to the result's dtype: as bitsandbytes does in three passes.
A half is looked up in memory, 16 numbers in one line of the cache: a tree of selections takes half as many instructions
again, most of them of the pipe that a card has least of.
"""

import triton
import triton.language as tl
from torch import Tensor

WEIGHTS = 4096  # to a program of 4 warps: 16 bytes, 32 weights, to a thread
TOGETHER = tl.constexpr(256)  # scales of a second-level block
SETTINGS = {"num_warps": 4, "enable_fp_fusion": False}  # a fused product and sum would round once


def four_bits(
    packed: Tensor, absmax: Tensor, code: Tensor, nested: tuple[Tensor, ...], blocksize: int, *, result: Tensor
) -> None:
    """Fill result, contiguous, of packed (bytes, 1) uint8, absmax (blocks,) and code (16,), all contiguous.

    nested: code2 (256,), absmax2 and the offset () of absmax in uint8; empty where absmax is fp32.
    """
    count = result.numel()
    if not count:
        return
    code2, absmax2, offset = nested or (None, None, None)
    sizes = {"BLOCK": blocksize, "BLOCKS": WEIGHTS // blocksize, "NESTED": bool(nested)}
    _four_bits[(triton.cdiv(count, WEIGHTS),)](
        packed, absmax, code, code2, absmax2, offset, result, count, (count + 1) // 2, **sizes, **SETTINGS
    )


@triton.jit
def _four_bits(
    packed, absmax, code, code2, absmax2, offset, result, count, size,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK // 2
    dtype: tl.constexpr = result.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    each = tl.arange(0, BLOCKS)
    whole = first * BLOCK + each * BLOCK < count
    if NESTED:
        level = tl.load(absmax + first + each, mask=whole, other=0).to(tl.uint32)
        factor = tl.load(absmax2 + (first + each) // TOGETHER, mask=whole, other=0.0)
        scale = tl.load(code2 + level) * factor + tl.load(offset)
    else:
        scale = tl.load(absmax + first + each, mask=whole, other=0.0)

    # A mask by bytes of their own count: made of weights, it would part a wide load into single ones.
    place = each[:, None] * HALF + tl.arange(0, HALF)[None, :]
    both = tl.load(packed + first * HALF + place, mask=place < size - first * HALF, other=0).to(tl.uint32)
    high = tl.load(code + (both >> 4)) * scale[:, None]
    low = tl.load(code + (both & 15)) * scale[:, None]
    made = tl.interleave(high.to(dtype), low.to(dtype))
    place = each[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(result + first * BLOCK + place, made, mask=place < count - first * BLOCK)
