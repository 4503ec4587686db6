"""LoRA without a copy of its input: peft's layers, with their forward replaced.

peft keeps A and B in fp32, casts every linear's *input* up to fp32 to match and keeps that copy for backward: a quarter
of all saved bytes. Here the small matrices are cast down to the activation's dtype instead, so that x is kept once,
as it is, and the fp32 masters still take the gradient and the update.
"""

from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lite.model.frozen import is_frozen, product, weight_of


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


class Adapted(NamedTuple):
    """A frozen linear layer and the one adapter that is at work on it; without one, a and b are None."""

    base: nn.Linear
    a: Tensor | None  # (R, in)
    b: Tensor | None  # (out, R)
    scale: float


def adapted(layer: nn.Module, x: Tensor) -> Adapted | None:
    """What `layer` is made of, if it computes base(x) + scale · (x Aᵀ) Bᵀ, or base(x), with a frozen base in x's dtype.

    None if it is anything else: a trained base, several adapters, biases or dropout in one, DoRA, merged.
    """
    if not isinstance(layer, LoraLayer):
        return Adapted(layer, None, None, 1.0) if is_frozen(layer, x) else None
    base, names = layer.base_layer, [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or not is_frozen(base, x):
        return None
    if layer.disable_adapters or not names:
        return Adapted(base, None, None, 1.0)
    name, down, up = names[0], layer.lora_A[names[0]], layer.lora_B[names[0]]
    dropout = layer.lora_dropout[name]
    random = layer.training and not isinstance(dropout, nn.Identity) and dropout.p > 0
    if len(names) > 1 or name in layer.lora_variant or down.bias is not None or up.bias is not None or random:
        return None
    return Adapted(base, down.weight, up.weight, layer.scaling[name])


def forward(layer: LoraLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """base(x) + scale · (x Aᵀ) Bᵀ, summed over the active adapters, in x's dtype.

    Saved for backward: x itself, the (T, R) product and the matrices; never a copy of x, nor a dequantised weight.
    x (…, in), returns (…, out) in the dtype of the base layer's result. peft's own forward takes over whenever it
    does something else: adapter off, merged, one adapter per row, or a variant such as DoRA (which does copy x).
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or kwargs or any(name in layer.lora_variant for name in names):
        return type(layer).forward(layer, x, *args, **kwargs)
    parts = None if args else adapted(layer, x)
    if parts is not None and parts.a is not None:
        return _AdaptedLinear.apply(x, parts.base, parts.a, parts.b, parts.scale)
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


class _AdaptedLinear(torch.autograd.Function):
    """x Wᵀ + bias + scale · (x Aᵀ) Bᵀ with W frozen: both products of forward, and both of d x, share one buffer.

    Left to autograd, base and adapter each make a result and a gradient of x of their own, which are then added.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.flatten(0, -2)  # (T, in)
        low = flat @ a.to(x.dtype).t()  # (T, R)
        result = product(base, flat).addmm_(low, b.to(x.dtype).t(), alpha=scale)  # (T, out)
        ctx.save_for_backward(flat, low, a, b)
        ctx.base, ctx.scale, ctx.shape = base, scale, x.shape
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        grad = grad.flatten(0, -2)  # (T, out)
        d_low = (grad @ b.to(x.dtype)).mul_(ctx.scale)  # (T, R)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (grad @ weight_of(ctx.base, x.dtype)).addmm_(d_low, a.to(x.dtype)).view(ctx.shape)
        d_a = (d_low.t() @ x).to(a.dtype)
        d_b = (grad.t() @ low).to(b.dtype).mul_(ctx.scale)
        return d_x, None, d_a, d_b, None


def _add_product(result: Tensor, low: Tensor, up: Tensor, scale: float) -> Tensor:
    # One product that adds onto the base's result: no (T, out) update of its own, and one rounding instead of three.
    # Not in place: a quantised layer's result is a view out of a custom Function, which autograd refuses to overwrite.
    flat = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), up.T, alpha=scale)  # (T, out)
    return flat.view(result.shape)


def _cast(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _quantised(module: LoraLayer) -> bool:
    from peft.tuners.lora import bnb

    return isinstance(module, bnb.Linear4bit | bnb.Linear8bitLt)
