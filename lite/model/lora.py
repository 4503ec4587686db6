"""LoRA without a copy of its input: peft's layers, with their forward replaced.

peft keeps A and B in fp32, casts every linear's *input* up to fp32 to match and keeps that copy for backward: a quarter
of all saved bytes. Here the small matrices are cast down to the activation's dtype instead, so that x is kept once,
as it is, and the fp32 masters still take the gradient and the update.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear8bitLt
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lite.model.frozen import is_frozen, product, serves_backward, weight_of


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
    Within `cast_once` it is looked at once, for it takes as long as several operators.
    """
    if _once is None or not isinstance(layer, LoraLayer):
        return _looked_at(layer, x)
    key = id(layer), x.dtype, layer.training, layer.disable_adapters, layer.merged, tuple(layer.active_adapters)
    if key not in _once.parts:
        _once.parts[key] = _looked_at(layer, x)
    return _once.parts[key]


def _looked_at(layer: nn.Module, x: Tensor) -> Adapted | None:
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

    Saved for backward is what `products` saves; never a copy of x.
    x (…, in), returns (…, out) in the dtype of the base layer's result. peft's own forward takes over whenever it
    does something else: adapter off, merged, one adapter per row, or a variant such as DoRA (which does copy x).
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or kwargs or any(name in layer.lora_variant for name in names):
        return type(layer).forward(layer, x, *args, **kwargs)
    parts = None if args else adapted(layer, x)
    if parts is not None and parts.a is not None:
        return products(x, (parts,))[0]
    result = layer.base_layer(x, *args)  # (…, out)
    for name in names:
        down, up = layer.lora_A[name], layer.lora_B[name]
        low = F.linear(layer.lora_dropout[name](x), down.weight.to(x.dtype), _bias(down.bias, x))  # (…, R)
        if up.bias is None and result.dtype == x.dtype:
            result = _add_product(result, low, up.weight.to(x.dtype), layer.scaling[name])
        else:
            update = F.linear(low, up.weight.to(x.dtype), _bias(up.bias, x)) * layer.scaling[name]
            result = result + update.to(result.dtype)
    return result


def go_together(parts: Sequence[Adapted | None]) -> bool:
    """Whether `products` computes layers that `adapted` says this of: it knows all, and one has an adapter."""
    return all(part is not None for part in parts) and any(part.a is not None for part in parts)


def products(x: Tensor, parts: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """base(x) + scale · (x Aᵀ) Bᵀ of layers with one input, each in x's dtype; one of them has an adapter, or more.

    One product of x is for all A, one for all d A, and d x of all bases and adapters is summed in one buffer. Saved
    for backward: x, once, or what a norm made it of (`norms.Normed`), which is kept anyway, to make x again; x Aᵀ of
    all, (T, ΣR); and a dequantised weight where the base serves backward. x (…, in), returns (…, out) of each.
    """
    # Of a norm's result that somebody wrote to since, the norm knows nothing.
    normed = getattr(x, "_normed", None) if torch.is_grad_enabled() and x._version == 0 else None
    return _Products.apply(x, normed, parts, *[matrix for part in _with_adapter(parts) for matrix in (part.a, part.b)])


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, normed: Any, parts: Sequence[Adapted], *matrices: Tensor) -> tuple[Tensor, ...]:
        flat = x.flatten(0, -2)  # (T, in)
        low = flat @ _all_a(parts, x.dtype).t()  # (T, ΣR)
        results, weights = [], []
        for part, columns in zip(parts, _ranks(parts), strict=True):
            kept = weight_of(part.base, x.dtype) if ctx.needs_input_grad[0] and serves_backward(part.base) else None
            # A buffer of the final shape, not a view of one: some models write to what comes out.
            result = x.new_empty(*x.shape[:-1], part.base.out_features)
            adapted_product(part, flat, low[:, columns], result.flatten(0, -2), weight=kept)
            results.append(result)
            weights.append(kept)
        ctx.save_for_backward(low, *weights, *matrices, *((flat,) if normed is None else normed))
        ctx.set_materialize_grads(False)
        # The matrices as themselves, for `cast`: of what is saved, a checkpoint hands back another tensor.
        ctx.parts, ctx.normed, ctx.shape = parts, normed and type(normed), x.shape
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        parts, (low, *saved) = ctx.parts, ctx.saved_tensors
        dtype = low.dtype
        weights, source = saved[: len(parts)], saved[len(parts) + 2 * len(_with_adapter(parts)) :]
        grads = [None if grad is None else grad.flatten(0, -2) for grad in grads]  # (T, out) each
        d_low, d_b = torch.empty_like(low), []
        for part, grad, columns in zip(parts, grads, _ranks(parts), strict=True):
            if part.a is not None and grad is not None:
                d_low[:, columns].addmm_(grad, cast(dtype, part.b), beta=0, alpha=part.scale)
                d_up = grad.new_empty(part.b.shape).addmm_(grad.t(), low[:, columns], beta=0, alpha=part.scale)
                d_b.append(d_up.to(part.b.dtype))
            elif part.a is not None:
                d_low[:, columns].zero_()
                d_b.append(None)
        x = source[0] if ctx.normed is None else ctx.normed(*source).again().flatten(0, -2)  # (T, in)
        d_a = (d_low.t() @ x).to(_with_adapter(parts)[0].a.dtype)  # (ΣR, in)
        del x, source, saved  # before d x is there
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = d_low @ _all_a(parts, dtype)  # (T, in)
            for part, grad, kept in zip(parts, grads, weights, strict=True):
                if grad is not None:
                    d_x.addmm_(grad, weight_of(part.base, dtype) if kept is None else kept)
            d_x = d_x.view(ctx.shape)
        each_d_a = [d_a[rows] for part, rows in zip(parts, _ranks(parts), strict=True) if part.a is not None]
        return d_x, None, None, *itertools.chain(*zip(each_d_a, d_b, strict=True))


def adapted_product(
    part: Adapted, x: Tensor, low: Tensor | None, out: Tensor | None = None, *, weight: Tensor | None = None
) -> Tensor:
    """base(x) + scale · low Bᵀ in x's dtype, without gradient; x (T, in), low = x Aᵀ (T, R), returns (T, out).

    The small product first, onto which the large one is added as it is made: its result is rounded once, and not read
    and written again for the sake of the small one. As `frozen.product` it takes `out` and `weight`.
    """
    base, bias = part.base, part.base.bias
    if part.b is None:
        return product(base, x, out, weight=weight)
    up = cast(x.dtype, part.b).t()
    if bias is not None and isinstance(base, Linear8bitLt):  # whose bias is added to what is rounded, as without B
        return product(base, x, out, weight=weight).addmm_(low, up, alpha=part.scale)
    beta, start = (0, low.new_empty(())) if bias is None else (1, bias.to(x.dtype))
    result = torch.addmm(start, low, up, beta=beta, alpha=part.scale, out=out)
    return result.addmm_(x, (weight_of(base, x.dtype) if weight is None else weight).t())


@contextmanager
def cast_once() -> Iterator[None]:
    """Within: a matrix is cast to the dtype that it computes in once, not in each layer's every pass.

    The copies, of 2 bytes a trained number in bf16, live until the end. Masters that are changed meanwhile are cast
    anew; adapters are not put on or taken off. May be entered within itself.
    """
    global _once
    if _once is not None:
        yield
        return
    _once = _Once({}, {})
    try:
        yield
    finally:
        _once = None


class _Once(NamedTuple):
    """What is made once, and found again by all that it depends on."""

    casts: dict[tuple[object, ...], tuple[list[int], Sequence[Tensor], Tensor]]
    parts: dict[tuple[object, ...], Adapted | None]


# Not of a thread: backward has threads of its own, and computes with what was cast in forward.
_once: _Once | None = None


def cast(dtype: torch.dtype, *matrices: Tensor) -> Tensor:
    """The matrices, one below the other, in `dtype` and without gradient; itself if it is one in that dtype."""
    if len(matrices) == 1 and matrices[0].dtype == dtype:
        return matrices[0].detach()
    # Where nothing is cast, to put them together is cheap, and needs no second copy of the masters all along.
    if _once is None or all(matrix.dtype == dtype for matrix in matrices):
        return _stacked(dtype, matrices)
    key, versions = (dtype, *map(id, matrices)), [matrix._version for matrix in matrices]
    found = _once.casts.get(key)
    if found is None or found[0] != versions:
        # With the masters themselves, so that their ids are not given to others.
        _once.casts[key] = found = (versions, matrices, _stacked(dtype, matrices))
    return found[2]


@torch.no_grad()
def _stacked(dtype: torch.dtype, matrices: Sequence[Tensor]) -> Tensor:
    if len(matrices) == 1:
        return matrices[0].to(dtype)
    rows = _slices([len(matrix) for matrix in matrices])
    stacked = torch.empty(rows[-1].stop, *matrices[0].shape[1:], dtype=dtype, device=matrices[0].device)
    for its, matrix in zip(rows, matrices, strict=True):
        stacked[its].copy_(matrix)
    return stacked


def _with_adapter(parts: Sequence[Adapted]) -> list[Adapted]:
    return [part for part in parts if part.a is not None]


def _ranks(parts: Sequence[Adapted]) -> list[slice]:
    """Which of the ΣR are each layer's."""
    return _slices([0 if part.a is None else len(part.a) for part in parts])


def _slices(lengths: Sequence[int]) -> list[slice]:
    return [slice(end - length, end) for length, end in zip(lengths, itertools.accumulate(lengths), strict=True)]


def _all_a(parts: Sequence[Adapted], dtype: torch.dtype) -> Tensor:
    return cast(dtype, *[part.a for part in _with_adapter(parts)])  # (ΣR, in)


def _add_product(result: Tensor, low: Tensor, up: Tensor, scale: float) -> Tensor:
    # One product that adds onto the base's result: no (T, out) update of its own, and one rounding instead of three.
    # Not in place: a quantised layer's result is a view out of a custom Function, which autograd refuses to overwrite.
    flat = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), up.T, alpha=scale)  # (T, out)
    return flat.view(result.shape)


def _bias(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _quantised(module: LoraLayer) -> bool:
    from peft.tuners.lora import bnb

    return isinstance(module, bnb.Linear4bit | bnb.Linear8bitLt)
