"""The rotary turn by Triton: one program for some heads of a token, so that cosines and sines are read once for them.

Of a head (x₁, x₂) with cosines (c₁, c₂) and sines (s₁, s₂) it makes (x₁ c₁ − x₂ s₁, x₂ c₂ + x₁ s₂); the transpose is
(y₁ c₁ + y₂ s₂, y₂ c₂ − y₁ s₁).
"""

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024  # pairs of numbers of a program


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, result: Tensor, backward: bool) -> None:
    """Fill result (B, H, T, d), in memory (B, T, H, d). x (B, H, T, d) of any strides; cos, sin contiguous."""
    batch, heads, tokens, _ = x.shape
    if not x.numel():
        return
    settings = _settings(x)
    blocks = triton.cdiv(heads, settings["HEADS"])
    _rotate[(batch * tokens * blocks,)](
        x, cos, sin, result, *x.stride(), tokens, heads, blocks, ONE_TABLE=len(cos) == 1, BACKWARD=backward, **settings
    )  # fmt: skip


def _settings(x: Tensor) -> dict[str, int | bool]:
    _, heads, _, width = x.shape
    half = triton.next_power_of_2(width // 2)
    together = min(triton.next_power_of_2(heads), max(1, ELEMENTS // half))
    warps = max(1, together * half // 256)  # 8 numbers a thread: 16 bytes of bf16
    # Without fusion: it would take a product into the sum unrounded, in bf16 too.
    return {"HALF": width // 2, "HEADS": together, "BLOCK": half, "num_warps": warps, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["tokens"])
def _rotate(
    x, cos, sin, result, batch_stride, head_stride, token_stride, stride, tokens, heads, blocks,
    ONE_TABLE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    place = (tl.program_id(0) // blocks).to(tl.int64)  # of the token in all batches
    batch = place // tokens
    token = place % tokens
    head = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    inside = (head < heads)[:, None] & (column < HALF)[None, :]
    dtype: tl.constexpr = result.dtype.element_ty

    table = (token if ONE_TABLE else place) * (2 * HALF) + column
    cos_1 = tl.load(cos + table, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos + table + HALF, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin + table, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin + table + HALF, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    wide = column[None, :].to(tl.int64)  # a last dimension of any stride
    start = x + batch * batch_stride + token * token_stride + head.to(tl.int64)[:, None] * head_stride
    x_1 = tl.load(start + wide * stride, mask=inside, other=0.0).to(tl.float32)
    x_2 = tl.load(start + (wide + HALF) * stride, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        other_1 = (x_2 * sin_2).to(dtype).to(tl.float32)
        other_2 = -(x_1 * sin_1).to(dtype).to(tl.float32)
    else:
        other_1 = -(x_2 * sin_1).to(dtype).to(tl.float32)
        other_2 = (x_1 * sin_2).to(dtype).to(tl.float32)
    made_1 = (x_1 * cos_1).to(dtype).to(tl.float32) + other_1
    made_2 = (x_2 * cos_2).to(dtype).to(tl.float32) + other_2
    out = result + (place * heads + head)[:, None] * (2 * HALF) + column[None, :]
    tl.store(out, made_1.to(dtype), mask=inside)
    tl.store(out + HALF, made_2.to(dtype), mask=inside)
