"""A gated MLP that keeps gate and up only: their product, the input of the last projection, is made again in backward.

Left to autograd, act(gate) and act(gate) · up are kept as well, twice the bytes; to make them again is two passes over
memory beside three matrix products.
"""

import functools
from collections.abc import Callable
from types import CodeType, MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from lite.model.frozen import product, weight_of
from lite.model.lora import Adapted, adapted
from lite.model.matrices import matrix_of
from lite.optim.matrix import Matrix


class Activation(NamedTuple):
    """A function and its derivative, as autograd computes them."""

    value: Callable[[Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], Tensor]  # (d value, x): d x in place of d value


SILU = Activation(F.silu, lambda grad, x: torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad))
GELU_TANH = Activation(
    functools.partial(F.gelu, approximate="tanh"),
    lambda grad, x: torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad),
)


def replace_mlps(model: nn.Module) -> int:
    """Let every gated MLP of `model` compute as `forward` below; returns how many there are.

    To be called after adapters were attached. Left alone are those whose code or activation is not known.
    """
    found = [module for module in model.modules() if is_gated(module) and _activation(module) is not None]
    for module in found:
        module.forward = MethodType(forward, module)
    return len(found)


def is_gated(module: nn.Module) -> bool:
    """Whether a module is down(act(gate(x)) · up(x)): its class's forward is, instruction by instruction, known code.

    So the answer is the same on meta, where nothing can be tried.
    """
    if not isinstance(getattr(module, "down_proj", None), nn.Module):
        return False
    return any(_same_code(type(module).forward, known.forward) for known in (LlamaMLP, Phi3MLP))


def forward(mlp: nn.Module, x: Tensor) -> Tensor:
    """down(act(gate(x)) · up(x)), bit for bit as the module has it; x (…, D), returns (…, D).

    Saved for backward, beside what the first projections save: gate and up, (T, F) each, and the adapter's matrices.
    A checkpoint's recomputation ends when it has these: the last projection is not computed again. The module's own
    forward takes over where down_proj is not a frozen layer with at most one plain adapter (`lora.adapted`), nor one
    that feeds a Matrix.
    """
    gate, up = _halves(mlp, x)
    activation, matrix = _activation(mlp), matrix_of(mlp.down_proj)
    fed = matrix is not None and mlp.down_proj.bias is None
    parts = None if fed else adapted(mlp.down_proj, gate)
    if (parts is None and not fed) or gate.dtype != up.dtype:
        return mlp.down_proj(activation.value(gate) * up)
    gate, up = gate.flatten(0, -2), up.flatten(0, -2)
    if fed:
        result = _TrainedTail.apply(gate, up, matrix.anchor, activation, matrix)
        with torch.no_grad():
            matrix.product(activation.value(gate).mul_(up), out=result)
    else:
        result = _Tail.apply(gate, up, activation, *parts)  # (T, D)
        with torch.no_grad():
            _fill(result, gate, up, activation, parts)
    return result.view(*x.shape[:-1], -1)


class _Tail(torch.autograd.Function):
    """The result's buffer, not filled yet: what is saved is saved before the product, which a recomputation skips."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        activation: Activation,
        base: nn.Linear,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(gate, up, a, b)
        ctx.activation, ctx.base, ctx.scale = activation, base, scale
        return gate.new_empty(len(gate), base.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, a, b = ctx.saved_tensors
        d_a = d_b = d_low = d_gate = d_up = None
        if a is not None:
            hidden = ctx.activation.value(gate).mul_(up)  # (T, F)
            low = hidden @ a.to(grad.dtype).t()  # (T, R)
            d_low = (grad @ b.to(grad.dtype)).mul_(ctx.scale)  # (T, R)
            d_a = (d_low.t() @ hidden).to(a.dtype)
            d_b = (grad.t() @ low).to(b.dtype).mul_(ctx.scale)
            del hidden  # before d_hidden is there: never more than two (T, F) beside gate and up
        if any(ctx.needs_input_grad[:2]):
            d_hidden = grad @ weight_of(ctx.base, grad.dtype)  # (T, F)
            if a is not None:
                d_hidden.addmm_(d_low, a.to(grad.dtype))
            d_gate, d_up = _into_halves(d_hidden, gate, up, ctx.activation)
        return d_gate, d_up, None, None, d_a, d_b, None


class _TrainedTail(torch.autograd.Function):
    """The same where down's weight feeds a Matrix."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, anchor: Tensor, activation: Activation, matrix: Matrix) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.matrix = activation, matrix
        return gate.new_empty(len(gate), len(matrix.weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        ctx.matrix.take(grad, ctx.activation.value(gate).mul_(up))
        if not any(ctx.needs_input_grad[:2]):
            return None, None, None, None, None
        d_gate, d_up = _into_halves(ctx.matrix.back(grad), gate, up, ctx.activation)
        return d_gate, d_up, None, None, None


def _into_halves(d_hidden: Tensor, gate: Tensor, up: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """d gate and d up of hidden = act(gate) · up; d_hidden is overwritten."""
    d_up = activation.value(gate).mul_(d_hidden)
    return activation.backward_(d_hidden.mul_(up), gate), d_up


def _fill(result: Tensor, gate: Tensor, up: Tensor, activation: Activation, parts: Adapted) -> None:
    hidden = activation.value(gate).mul_(up)  # (T, F)
    product(parts.base, hidden, out=result)
    if parts.a is not None:
        low = hidden @ parts.a.to(gate.dtype).t()  # (T, R)
        result.addmm_(low, parts.b.to(gate.dtype).t(), alpha=parts.scale)


def _halves(mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    if hasattr(mlp, "gate_up_proj"):
        return mlp.gate_up_proj(x).chunk(2, dim=-1)
    return mlp.gate_proj(x), mlp.up_proj(x)


def _activation(mlp: nn.Module) -> Activation | None:
    function = mlp.activation_fn if hasattr(mlp, "gate_up_proj") else mlp.act_fn
    if type(function) in (SiLUActivation, nn.SiLU):
        return SILU
    # The other kind of GELUTanh is a Python function of its own roundings.
    return GELU_TANH if type(function) is GELUTanh and isinstance(function.act, functools.partial) else None


def _same_code(one: Callable, other: Callable) -> bool:
    def instructions(function: Callable) -> tuple[object, ...]:
        code: CodeType = function.__code__
        return code.co_code, code.co_names, code.co_consts, code.co_argcount

    return hasattr(one, "__code__") and instructions(one) == instructions(other)
