"""RMSNorm that keeps its input and one number a token: on a GPU in one pass over memory, else in half the passes.

transformers' norm goes up to fp32 operation by operation; left to autograd, each step of that is kept for backward:
14 bytes a number in bf16 where 2 are needed, and a fifth of a small model's step on a CPU. Not even the result need be
kept by what comes next: `Normed`, which a result carries, makes it again.
"""

import copy
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lite.kernels import operators

PART_ROWS = 8192


class Normed(NamedTuple):
    """What a norm's result was made of; all three are kept for the norm's own backward."""

    x: Tensor  # (…, D)
    weight: Tensor  # (D,)
    scale: Tensor  # (T, 1) fp32: 1 / √(mean(x²) + epsilon) of each of the T = numel(x) / D rows

    def again(self) -> Tensor:
        """The result, (…, D), bit for bit as the norm gave it."""
        rows = self.x.detach().flatten(0, -2)  # (T, D)
        weight = self.weight.detach()
        if operators.at_hand(rows):
            return operators.rms_norm_again(rows, weight, self.scale).view(self.x.shape)
        result = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for part in _parts(len(rows)):
            _scaled_into(result[part], rows[part].to(torch.float32), self.scale[part], weight)
        return result.view(self.x.shape)


def replace_norms(model: nn.Module) -> int:
    """Let every RMSNorm of `model` compute as `rms_norm` below, be it trained, now or later, or not; returns how many.

    Only where the plain twin gives the module's own result, bit for bit, on a trial: other norms that go by the name
    scale by 1 + weight, or round elsewhere, and are left alone.
    """
    replaced = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon") and _same(module):
            module.forward = MethodType(_forward, module)
            replaced += 1
    return replaced


def is_replaced(module: nn.Module) -> bool:
    """Whether `replace_norms` has replaced it."""
    return getattr(module.forward, "__func__", None) is _forward


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight · x / √(mean(x²) + epsilon), the quotient in fp32 and rounded to x's dtype before the weight.

    x (…, D); weight (D,), frozen or trained. Kept for backward: x, weight, and (…, 1) fp32. The gradient of a trained
    weight, Σ over tokens of grad · quotient, is summed in fp32 and rounded once. With a frozen weight the result's
    `_normed` is the `Normed` that it was made of, for who would keep the result for backward; it holds as long as
    nobody writes to the result (`_version` is 0).
    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4; the roundings are those of transformers.
    """
    result, scale = _RMSNorm.apply(x, weight, epsilon)
    if torch.is_grad_enabled() and not weight.requires_grad:
        result._normed = Normed(x, weight, scale)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, -2)  # (T, D)
        compute = operators.rms_norm if operators.at_hand(rows) else _plain
        result, scale = compute(rows, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        return result.view(x.shape), scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None
        x, weight, scale = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad[:2]
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        d_x = d_weight = None
        if of_x and operators.at_hand(rows):
            d_x = operators.rms_norm_backward(grads, rows, weight, scale)
            of_x = False
        if of_x or of_weight:
            plain, d_weight = _plain_backward(grads, rows, weight, scale, of_x=of_x, of_weight=of_weight)
            d_x = plain if of_x else d_x
        return None if d_x is None else d_x.view(x.shape), d_weight, None


def _plain(rows: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The plain twin of `operators.rms_norm`."""
    result = torch.empty_like(rows, memory_format=torch.contiguous_format)
    scale = rows.new_empty(len(rows), 1, dtype=torch.float32)
    for part in _parts(len(rows)):
        precise = rows[part].to(torch.float32)
        scale[part] = torch.rsqrt(precise.square().mean(-1, keepdim=True) + epsilon)
        _scaled_into(result[part], precise, scale[part], weight)
        del precise  # else it lives beside the next part's
    return result.data, scale  # with a version of its own: to fill a result is not to write to it


def _scaled_into(result: Tensor, precise: Tensor, scale: Tensor, weight: Tensor) -> None:
    torch.mul(weight, (precise * scale).to(result.dtype), out=result)


def _plain_backward(
    grads: Tensor, rows: Tensor, weight: Tensor, scale: Tensor, *, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """d x, of which `operators.rms_norm_backward` is the twin, and d weight, which has none."""
    result = torch.empty_like(rows, memory_format=torch.contiguous_format) if of_x else None
    total = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
    for part in _parts(len(rows)):
        unit = rows[part].to(torch.float32, copy=True).mul_(scale[part])
        if total is not None:  # by the quotient as forward multiplied it, rounded to x's dtype
            total += (unit.to(rows.dtype) * grads[part].to(torch.float32)).sum(0)
        if result is not None:
            slope = (grads[part] * weight).to(torch.float32)
            along = (slope * unit).mean(-1, keepdim=True)
            result[part] = slope.addcmul_(unit, along, value=-1).mul_(scale[part])
            del slope
        del unit
    return result, None if total is None else total.to(weight.dtype)


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
    return torch.equal(norm(trial), _plain(trial, weight, norm.variance_epsilon)[0])
