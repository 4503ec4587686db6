"""RMSNorm by Triton, on rows of any stride: one program for a long row, or for several short ones.

One reading of each tensor, a row in registers in fp32. What is rounded in between is what the plain twin rounds
(`lite/model/norms.py`).
"""

import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048  # of a program, where a row is shorter


def forward(x: Tensor, weight: Tensor, epsilon: float, *, result: Tensor, scale: Tensor) -> None:
    """Fill result (T, D), contiguous, and scale (T, 1) fp32. x (T, D), each row contiguous."""
    grid, blocks = _blocks(x)
    if grid:
        _forward[grid](x, weight, result, scale, len(x), x.stride(0), epsilon, **blocks)


def again(x: Tensor, weight: Tensor, scale: Tensor, *, result: Tensor) -> None:
    """Fill result as `forward` did, of the scale that it gave."""
    grid, blocks = _blocks(x)
    if grid:
        _again[grid](x, weight, result, scale.contiguous(), len(x), x.stride(0), **blocks)


def backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, result: Tensor) -> None:
    """Fill result, d x, (T, D) contiguous. grad and x (T, D), each row contiguous."""
    grid, blocks = _blocks(x)
    if grid:
        scale = scale.contiguous()
        _backward[grid](grad, x, weight, result, scale, len(x), grad.stride(0), x.stride(0), **blocks)


def _blocks(x: Tensor) -> tuple[tuple[int] | None, dict[str, int]]:
    rows, width = x.shape
    block = triton.next_power_of_2(max(width, 1))
    together = max(1, ELEMENTS // block)
    elements = together * block
    warps = 4 if elements <= 2048 else 8 if elements <= 8192 else 16 if elements <= 32768 else 32
    settings = {"WIDTH": width, "ROWS": together, "BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}
    return ((triton.cdiv(rows, together),) if rows and width else None), settings


@triton.jit
def _scaled(values, factor, weights, dtype: tl.constexpr):
    quotient = (values * factor[:, None]).to(dtype).to(tl.float32)
    return quotient * weights[None, :]


@triton.jit(do_not_specialize=["rows", "epsilon"])
def _forward(
    x, weight, result, scale, rows, stride, epsilon, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    values = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, axis=1) / WIDTH + epsilon)
    tl.store(scale + row, factor, mask=row < rows)
    made = _scaled(values, factor, weights, x.dtype.element_ty)
    tl.store(result + row[:, None] * WIDTH + column[None, :], made.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _again(x, weight, result, scale, rows, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    values = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    factor = tl.load(scale + row, mask=row < rows, other=0.0)
    made = _scaled(values, factor, weights, x.dtype.element_ty)
    tl.store(result + row[:, None] * WIDTH + column[None, :], made.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad,
    x,
    weight,
    result,
    scale,
    rows,
    grad_stride,
    stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    values = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    weights = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    factor = tl.load(scale + row, mask=row < rows, other=0.0)
    slope = slope * weights[None, :]
    if grad.dtype.element_ty == weight.dtype.element_ty:  # else the product of the two is fp32 in torch
        slope = slope.to(grad.dtype.element_ty).to(tl.float32)
    unit = values * factor[:, None]
    along = tl.sum(slope * unit, axis=1) / WIDTH
    made = (slope - unit * along[:, None]) * factor[:, None]
    tl.store(result + row[:, None] * WIDTH + column[None, :], made.to(result.dtype.element_ty), mask=inside)
