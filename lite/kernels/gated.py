"""act(gate) · up and its gradients by Triton, element by element, on rows of any stride.

Both activations are x · σ(u): SiLU with u = x; GELU by tanh with u = √(8/π) (x + 0.044715 x³), for ½ (1 + tanh z) =
σ(2z). So the derivative is σ(u) (1 + x u′ (1 − σ(u))).
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK_WIDTH = 1024
SETTINGS = {"BLOCK": BLOCK_WIDTH, "enable_fp_fusion": False}  # what is rounded stays rounded
ROOT = tl.constexpr(1.5957691216057308)  # √(8/π)
CUBIC = tl.constexpr(0.044715)
BY_TANH = {"silu": False, "gelu_tanh": True}


def forward(gate: Tensor, up: Tensor, activation: str, *, result: Tensor) -> None:
    """Fill result (T, F), contiguous. gate, up (T, F), each row contiguous."""
    tokens, width = gate.shape
    if gate.numel():
        blocks = triton.cdiv(width, BLOCK_WIDTH)
        _forward[(tokens * blocks,)](
            gate, up, result, gate.stride(0), up.stride(0), width, blocks, TANH=BY_TANH[activation], **SETTINGS
        )


def backward_(d_hidden: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """Overwrite gate and up with their gradients. All (T, F), each row contiguous."""
    tokens, width = gate.shape
    if gate.numel():
        blocks = triton.cdiv(width, BLOCK_WIDTH)
        strides = d_hidden.stride(0), gate.stride(0), up.stride(0)
        _backward[(tokens * blocks,)](d_hidden, gate, up, *strides, width, blocks, TANH=BY_TANH[activation], **SETTINGS)


@triton.jit
def _sigmoid(x, TANH: tl.constexpr):
    """σ(u) and x · u′."""
    if TANH:
        square = x * x
        u = ROOT * x * (1.0 + CUBIC * square)
        slope = ROOT * x * (1.0 + 3.0 * CUBIC * square)
    else:
        u = x
        slope = x
    return tl.sigmoid(u), slope


@triton.jit
def _forward(gate, up, result, gate_stride, up_stride, width, blocks, TANH: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    share, _ = _sigmoid(x, TANH)
    value = (x * share).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(result + row * width + column, (value * other).to(result.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    d_hidden, gate, up, d_stride, gate_stride, up_stride, width, blocks, TANH: tl.constexpr, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dtype: tl.constexpr = gate.dtype.element_ty
    grad = tl.load(d_hidden + row * d_stride + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    share, slope = _sigmoid(x, TANH)
    value = (x * share).to(dtype).to(tl.float32)
    d_value = (grad * other).to(dtype).to(tl.float32)
    tl.store(up + row * up_stride + column, (value * grad).to(dtype), mask=inside)
    d_gate = d_value * (share * (1.0 + slope * (1.0 - share)))
    tl.store(gate + row * gate_stride + column, d_gate.to(dtype), mask=inside)
