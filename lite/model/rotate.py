"""The rotary turn of queries and keys in one pass over memory: attention modules with another function in its place.

transformers' function is six operators, each a pass, and keeps a product's factors; the turn is linear, so its gradient
is made of cosines and sines alone.
"""

import functools
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama import modeling_llama

from lite.kernels import operators
from lite.model.code import same_code

NAME = "apply_rotary_pos_emb"


def replace_rotary(model: nn.Module) -> int:
    """Let every attention of `model` whose rotary turn is Llama's use `turned` below; returns how many there are.

    The class's forward is copied with another function under the global name, decorators and all, so that it stays
    whatever this version of transformers has. Left alone are modules whose turn is other code: partial, interleaved.
    """
    replaced = 0
    for module in model.modules():
        own = turn_of(type(module).forward)
        copied = None if own is None else _copied(type(module).forward, functools.partial(turned, own))
        if copied is not None:
            module.forward = MethodType(copied, module)
            replaced += 1
    return replaced


def turned(own: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
    """q and k at their positions: x · cos + rotate_half(x) · sin, by the kernel where it is at hand, else by `own`.

    q, k (B, heads, T, d); cos, sin (1 or B, T, d). Values are those of `own` bit for bit.
    """
    plain = bool(args or kwargs) or cos.requires_grad or sin.requires_grad
    if plain or not (operators.at_hand(q) and operators.at_hand(k)) or not _fit(q, cos) or not _fit(k, cos):
        return own(q, k, cos, sin, *args, **kwargs)
    return _Turn.apply(q, k, cos, sin)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        return operators.rotate(q, cos, sin), operators.rotate(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        d_q, d_k = [None if grad is None else operators.rotate(grad, cos, sin, backward=True) for grad in grads]
        return d_q, d_k, None, None


def _fit(x: Tensor, cos: Tensor) -> bool:
    return x.ndim == 4 and x.dtype == cos.dtype and cos.shape[1:] == (x.shape[2], x.shape[3]) and x.shape[3] % 2 == 0


def turn_of(forward: Callable) -> Callable | None:
    """The rotary function that this forward calls, if it is Llama's."""
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(NAME)
    half = getattr(own, "__globals__", {}).get("rotate_half")
    known = same_code(own, modeling_llama.apply_rotary_pos_emb) and same_code(half, modeling_llama.rotate_half)
    return own if known else None


def _copied(function: Callable, turn: Callable) -> FunctionType | None:
    """The function with `turn` as its global; of a decorated one, the decorator's own function around such a copy."""
    if not isinstance(function, FunctionType):
        return None
    cells, names = function.__closure__, function.__globals__
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        names = names | {NAME: turn}
    else:
        within = _copied(wrapped, turn)
        held = [cell.cell_contents is wrapped for cell in cells or ()]
        if within is None or not any(held):
            return None
        cells = tuple(CellType(within) if is_wrapped else cell for is_wrapped, cell in zip(held, cells, strict=True))
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    functools.update_wrapper(copied, function)
    copied.__kwdefaults__ = function.__kwdefaults__
    if wrapped is not None:
        copied.__wrapped__ = within
    else:
        del copied.__wrapped__
    return copied
