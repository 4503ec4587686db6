"""LoRA without a copy of its input: peft's layers, with their forward replaced.

peft keeps A and B in fp32, casts every linear's *input* up to fp32 to match and keeps that copy for backward: a quarter
of all saved bytes. Here the small matrices are cast down to the activation's dtype instead, so that x is kept once,
as it is, and the fp32 masters still take the gradient and the update.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def replace_forward(model: nn.Module) -> int:
    """Let every adapted linear of `model` compute as `forward` below; returns how many there are.

    To be called again after adapters were put on further layers. Left alone are adapted embeddings and convolutions.
    """
    replaced = 0
    for module in model.modules():
        if isinstance(module, Linear) or (isinstance(module, LoraLayer) and _quantised(module)):
            module.forward = MethodType(forward, module)
            replaced += 1
    return replaced


def forward(layer: LoraLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """base(x) + scale · (x Aᵀ) Bᵀ, summed over the active adapters, in x's dtype.

    Saved for backward: x itself, the (T, R) product and the matrices; never a copy of x.
    x (…, in), returns (…, out) in the dtype of the base layer's result. peft's own forward takes over whenever it
    does something else: adapter off, merged, one adapter per row, or a variant such as DoRA (which does copy x).
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or kwargs or any(name in layer.lora_variant for name in names):
        return type(layer).forward(layer, x, *args, **kwargs)
    if _is_plain(layer, names, x) and not args:
        (name,) = names
        base, down, up = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
        return _AdaptedLinear.apply(x, base.weight, base.bias, down, up, layer.scaling[name])
    result = layer.base_layer(x, *args)  # (…, out)
    for name in names:
        down, up = layer.lora_A[name], layer.lora_B[name]
        low = F.linear(layer.lora_dropout[name](x), down.weight.to(x.dtype), _cast(down.bias, x))  # (…, R)
        if up.bias is None and result.dtype == x.dtype:
            result = _add_product(result, low, up.weight.to(x.dtype), layer.scaling[name])
        else:
            update = F.linear(low, up.weight.to(x.dtype), _cast(up.bias, x)) * layer.scaling[name]
            result = result + update.to(result.dtype)
    return result


def _is_plain(layer: LoraLayer, names: list[str], x: Tensor) -> bool:
    """Whether one adapter, without biases or dropout, is at work on a frozen, unquantised linear layer of x's dtype."""
    base = layer.base_layer
    if type(base) is not nn.Linear or base.weight.requires_grad or base.weight.dtype != x.dtype or len(names) != 1:
        return False
    dropout = layer.lora_dropout[names[0]]
    active = layer.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
    return layer.lora_A[names[0]].bias is None and layer.lora_B[names[0]].bias is None and not active


class _AdaptedLinear(torch.autograd.Function):
    """x Wᵀ + bias + scale · (x Aᵀ) Bᵀ with W frozen: both products of forward, and both of d x, share one buffer.

    Left to autograd, base and adapter each make a result and a gradient of x of their own, which are then added.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        flat = x.flatten(0, -2)  # (T, in)
        low = flat @ down.to(x.dtype).t()  # (T, R)
        result = F.linear(flat, weight, bias).addmm_(low, up.to(x.dtype).t(), alpha=scale)  # (T, out)
        ctx.save_for_backward(flat, low, weight, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, down, up = ctx.saved_tensors
        grad = grad.flatten(0, -2)  # (T, out)
        d_low = (grad @ up.to(x.dtype)).mul_(ctx.scale)  # (T, R)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (grad @ weight).addmm_(d_low, down.to(x.dtype)).view(ctx.shape)
        d_down = (d_low.t() @ x).to(down.dtype)
        d_up = (grad.t() @ low).to(up.dtype).mul_(ctx.scale)
        return d_x, None, None, d_down, d_up, None


def _add_product(result: Tensor, low: Tensor, up: Tensor, scale: float) -> Tensor:
    # One product that adds onto the base's result: no (T, out) update of its own, and one rounding instead of three.
    # Not in place: the 8-bit layer's result is a view out of a custom Function, which autograd refuses to overwrite.
    flat = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), up.T, alpha=scale)  # (T, out)
    return flat.view(result.shape)


def _cast(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _quantised(module: LoraLayer) -> bool:
    from peft.tuners.lora import bnb

    return isinstance(module, bnb.Linear4bit | bnb.Linear8bitLt)
