"""A tiled MLP: so many tokens at a time, its input kept and nothing else; each tile is computed again in backward.

What an MLP holds, five times its input and more, is held for one tile; for long packs that is most of a layer. It costs
one forward of the MLP, and nothing more in a layer that is recomputed anyway.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lite.model.layers import decoder_layers
from lite.model.mlp import is_gated

Compute = Callable[[Tensor], Tensor]


def tile_mlps(model: nn.Module, tokens: int) -> int:
    """Let the MLP of every decoder layer run `tokens` tokens at a time; returns how many do. A later call replaces it.

    To be called after adapters were attached, for a tile runs what the MLP's forward is then. Gradients are the same up
    to rounding. Left alone are MLPs of unknown code, experts, and those that draw random numbers.
    Raises ValueError if tokens is not positive.
    """
    if tokens < 1:
        raise ValueError(f"tile_mlps: tokens = {tokens}, expected 1 or more")
    found = [m for layer in decoder_layers(model).values() for m in layer.children() if is_gated(m) and not _random(m)]
    for mlp in found:
        tiled_before = getattr(mlp.forward, "__func__", None) is _forward
        mlp._whole, mlp._tile_tokens = mlp._whole if tiled_before else mlp.forward, tokens
        mlp.forward = MethodType(_forward, mlp)
    return len(found)


def tiled(compute: Compute, x: Tensor, tokens: int, trained: list[Tensor]) -> Tensor:
    """compute(x), row block by row block of `tokens`; x (…, D), returns (…, D) in x's dtype.

    Saved for backward: x. `trained` are the parameters that `compute` gives a gradient; it must draw nothing random.
    A checkpoint's recomputation ends when it has x: the tiles are not computed a third time.
    """
    flat = x.flatten(0, -2)  # (T, D)
    result = _Tiled.apply(flat, compute, tokens, *trained)
    with torch.no_grad():
        for rows, into in zip(flat.split(tokens), result.detach().split(tokens), strict=True):
            into.copy_(compute(rows))
    return result.view(x.shape)


class _Tiled(torch.autograd.Function):
    """The result's buffer, not filled yet: x is saved before the tiles run, which a recomputation skips."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Compute, tokens: int, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved: they must be themselves, and what a checkpoint saves is handed back detached.
        ctx.compute, ctx.tokens, ctx.trained = compute, tokens, trained
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        d_x = torch.empty_like(x) if wanted else None
        d_trained: list[Tensor | None] = [None] * len(ctx.trained)
        for start in range(0, len(x), ctx.tokens):
            rows = slice(start, start + ctx.tokens)
            tile = x[rows].detach().requires_grad_(wanted)
            with torch.enable_grad():
                result = ctx.compute(tile)
            inputs = [*ctx.trained, tile] if wanted else list(ctx.trained)
            found = list(torch.autograd.grad(result, inputs, grad[rows], allow_unused=True))
            if wanted:
                d_x[rows] = found.pop()
            d_trained = [_sum(before, gradient) for before, gradient in zip(d_trained, found, strict=True)]
            del result, found  # before the next tile is there
        return d_x, None, None, *d_trained


def _forward(mlp: nn.Module, x: Tensor) -> Tensor:
    trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    return tiled(mlp._whole, x, mlp._tile_tokens, trained)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one if other is None else other if one is None else one + other


def _random(mlp: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in mlp.modules())
