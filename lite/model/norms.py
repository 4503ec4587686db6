"""RMSNorm that keeps its input and one number a token, in half the passes.

transformers' norm goes up to fp32 operation by operation; left to autograd, each step of that is kept for backward:
14 bytes a number in bf16 where 2 are needed, and a fifth of a small model's step on a CPU.
"""

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PART_ROWS = 8192


def replace_norms(model: nn.Module) -> int:
    """Let every RMSNorm of `model` compute as `rms_norm` below, be it trained, now or later, or not; returns how many.

    Only where that gives the module's own result, bit for bit, on a trial: other norms that go by the name scale by
    1 + weight, or round elsewhere, and are left alone.
    """
    replaced = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon") and _same(module):
            module.forward = MethodType(_forward, module)
            replaced += 1
    return replaced


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight · x / √(mean(x²) + epsilon), the quotient in fp32 and rounded to x's dtype before the weight.

    x (…, D); weight (D,), frozen or trained. Kept for backward: x, weight, and (…, 1) fp32. The gradient of a trained
    weight, Σ over tokens of grad · quotient, is summed in fp32 and rounded once.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4; the roundings are those of transformers.
    """
    return _RMSNorm.apply(x, weight, epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        rows = x.flatten(0, -2)  # (T, D)
        result, scale = torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=torch.float32)
        for part in _parts(len(rows)):
            precise = rows[part].to(torch.float32)
            scale[part] = torch.rsqrt(precise.square().mean(-1, keepdim=True) + epsilon)
            torch.mul(weight, (precise * scale[part]).to(x.dtype), out=result[part])
            del precise  # else it lives beside the next part's
        ctx.save_for_backward(x, weight, scale)
        return result.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad[:2]
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        result = torch.empty_like(rows) if of_x else None
        total = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        for part in _parts(len(rows)):
            unit = rows[part].to(torch.float32).mul_(scale[part])
            if total is not None:  # by the quotient as forward multiplied it, rounded to x's dtype
                total += (unit.to(x.dtype) * grads[part].to(torch.float32)).sum(0)
            if result is not None:
                slope = (grads[part] * weight).to(torch.float32)
                along = (slope * unit).mean(-1, keepdim=True)
                result[part] = slope.addcmul_(unit, along, value=-1).mul_(scale[part])
                del slope
            del unit
        return (
            None if result is None else result.view(x.shape),
            None if total is None else total.to(weight.dtype),
            None,
        )


def _parts(count: int) -> list[slice]:
    """Rows to take at once, for each goes up to fp32 several times over: of a long pack all together is the peak."""
    return [slice(start, min(start + PART_ROWS, count)) for start in range(0, max(count, 1), PART_ROWS)]


def _forward(norm: nn.Module, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, norm.weight, norm.variance_epsilon)


@torch.no_grad()
def _same(norm: nn.Module) -> bool:
    weight = norm.weight.detach()
    generator = torch.Generator("cpu").manual_seed(0)
    if weight.is_meta:  # tried with another weight, so that a dry run computes as the real one
        norm = copy.copy(norm)
        weight = torch.randn(weight.shape, generator=generator, device="cpu").to(weight.dtype)
        norm._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    trial = torch.randn(4, len(weight), generator=generator, device="cpu").to(device=weight.device, dtype=weight.dtype)
    return torch.equal(norm(trial), rms_norm(trial, weight, norm.variance_epsilon))
