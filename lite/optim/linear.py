"""Trained layers: a product whose backward feeds a Matrix, so that its weight's gradient is never made.

Kept for backward are x, as a full gradient would need it, or the ids.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lite.optim.matrix import Matrix


def trained_linear(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias in x's dtype; x (…, in), returns (…, out). Backward gives d x and d bias, and `matrix` the rest."""
    return _Linear.apply(x, matrix.anchor, bias, matrix)


def trained_embedding(ids: Tensor, matrix: Matrix) -> Tensor:
    """Row ids of W, (…, D) in the weight's dtype; backward gives `matrix` the rows that came back.

    A padding word is trained as any other: packs have none, and where it ends a turn as well it must be.
    """
    return _Embedding.apply(ids, matrix.anchor, matrix)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, bias: Tensor | None, matrix: Matrix) -> Tensor:
        flat = x.flatten(0, -2)  # (T, in)
        ctx.save_for_backward(flat)
        ctx.matrix, ctx.shape, ctx.bias = matrix, x.shape, bias
        return matrix.product(flat, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad = grad.flatten(0, -2)  # (T, out)
        ctx.matrix.take(grad, x)
        d_x = ctx.matrix.back(grad).view(ctx.shape) if ctx.needs_input_grad[0] else None
        d_bias = grad.sum(0, dtype=ctx.matrix.exact).to(ctx.bias.dtype) if ctx.needs_input_grad[2] else None
        return d_x, None, d_bias, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, anchor: Tensor, matrix: Matrix) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.matrix = matrix
        return torch.nn.functional.embedding(ids, matrix.weight.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        ctx.matrix.take_rows(ids.flatten(), grad.flatten(0, -2))
        return None, None, None
