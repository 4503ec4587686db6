"""A gated MLP that keeps gate and up only: their product, the input of the last projection, is made again in backward.

Left to autograd, act(gate) and act(gate) · up are kept as well, twice the bytes; to make them again is two passes over
memory beside three matrix products.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from lite.kernels import operators
from lite.model.code import same_code
from lite.model.frozen import weight_of
from lite.model.lora import Adapted, adapted, adapted_product, cast, go_together, products
from lite.model.matrices import matrix_of
from lite.optim.matrix import Matrix


class Activation(NamedTuple):
    """A function and its derivative, as autograd computes them, and the name by which the kernels know it."""

    name: operators.Activation
    value: Callable[[Tensor], Tensor]
    backward_: Callable[[Tensor, Tensor], Tensor]  # (d value, x): d x in place of d value


SILU = Activation("silu", F.silu, lambda grad, x: torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad))
GELU_TANH = Activation(
    "gelu_tanh",
    functools.partial(F.gelu, approximate="tanh"),
    lambda grad, x: torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad),
)


def replace_mlps(model: nn.Module) -> int:
    """Let every gated MLP of `model` compute as `forward` below; returns how many there are.

    To be called after adapters were attached. Left alone are those whose code or activation is not known.
    """
    found = [module for module in model.modules() if is_gated(module) and activation_of(module) is not None]
    for module in found:
        module.forward = MethodType(forward, module)
    return len(found)


def is_gated(module: nn.Module) -> bool:
    """Whether a module is down(act(gate(x)) · up(x)): its class's forward is, instruction by instruction, known code.

    So the answer is the same on meta, where nothing can be tried.
    """
    if not isinstance(getattr(module, "down_proj", None), nn.Module):
        return False
    return any(same_code(type(module).forward, known.forward) for known in (LlamaMLP, Phi3MLP))


def forward(mlp: nn.Module, x: Tensor) -> Tensor:
    """down(act(gate(x)) · up(x)), bit for bit as the module has it; x (…, D), returns (…, D).

    gate and up are computed together where they can be (`lora.products`). Saved for backward, beside what that saves:
    gate and up, (T, F) each, and the adapter's matrices. The kernels overwrite gate and up in backward, so that a
    second one over the same graph raises autograd's RuntimeError.
    A checkpoint's recomputation ends when it has these: the last projection is not computed again. The module's own
    forward takes over where down_proj is not a frozen layer with at most one plain adapter (`lora.adapted`), nor one
    that feeds a Matrix.
    """
    gate, up = _halves(mlp, x)
    activation, matrix = activation_of(mlp), matrix_of(mlp.down_proj)
    fed = matrix is not None and mlp.down_proj.bias is None
    parts = None if fed else _parts(mlp.down_proj, gate)
    if (parts is None and not fed) or gate.dtype != up.dtype:
        return mlp.down_proj(activation.value(gate) * up)
    gate, up = gate.flatten(0, -2), up.flatten(0, -2)
    if fed:
        result = _TrainedTail.apply(gate, up, matrix.anchor, activation, matrix)
        with torch.no_grad():
            matrix.product(_gated(gate, up, activation), out=result)
    else:
        result = _Tail.apply(gate, up, activation, parts, parts.a, parts.b)  # (T, D)
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
        parts: Adapted,
        a: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(gate, up, a, b)
        # The matrices as themselves, for `cast`: of what is saved, a checkpoint hands back another tensor.
        ctx.activation, ctx.parts = activation, parts
        return gate.new_empty(len(gate), parts.base.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, _, _ = ctx.saved_tensors
        base, a, b, scale = ctx.parts
        d_a = d_b = d_low = d_gate = d_up = None
        if a is not None:
            hidden = _gated(gate, up, ctx.activation)  # (T, F)
            low = hidden @ cast(grad.dtype, a).t()  # (T, R)
            d_low = torch.empty_like(low).addmm_(grad, cast(grad.dtype, b), beta=0, alpha=scale)  # (T, R)
            d_a = (d_low.t() @ hidden).to(a.dtype)
            d_b = grad.new_empty(b.shape).addmm_(grad.t(), low, beta=0, alpha=scale).to(b.dtype)
            del hidden  # before d_hidden is there: never more than two (T, F) beside gate and up
        if any(ctx.needs_input_grad[:2]):
            weight = weight_of(base, grad.dtype)
            # (T, F); the small product first, as in `lora.adapted_product`
            d_hidden = grad @ weight if a is None else (d_low @ cast(grad.dtype, a)).addmm_(grad, weight)
            del weight
            d_gate, d_up = _into_halves(d_hidden, gate, up, ctx.activation)
        return d_gate, d_up, None, None, d_a, d_b


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
        ctx.matrix.take(grad, _gated(gate, up, ctx.activation))
        if not any(ctx.needs_input_grad[:2]):
            return None, None, None, None, None
        d_gate, d_up = _into_halves(ctx.matrix.back(grad), gate, up, ctx.activation)
        return d_gate, d_up, None, None, None


def _gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    if operators.at_hand(gate):
        return operators.gated(gate, up, activation.name)
    return activation.value(gate).mul_(up)


def _into_halves(d_hidden: Tensor, gate: Tensor, up: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """d gate and d up of hidden = act(gate) · up; d_hidden is overwritten, or gate and up are, by the kernel."""
    if operators.at_hand(gate):
        operators.gated_backward_(d_hidden, gate, up, activation.name)
        torch.autograd.graph.increment_version((gate, up))
        return gate.detach(), up.detach()
    d_up = activation.value(gate).mul_(d_hidden)
    return activation.backward_(d_hidden.mul_(up), gate), d_up


def _fill(result: Tensor, gate: Tensor, up: Tensor, activation: Activation, parts: Adapted) -> None:
    hidden = _gated(gate, up, activation)  # (T, F)
    low = None if parts.a is None else hidden @ cast(gate.dtype, parts.a).t()  # (T, R)
    adapted_product(parts, hidden, low, out=result)


def _halves(mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    if hasattr(mlp, "gate_up_proj"):
        return mlp.gate_up_proj(x).chunk(2, dim=-1)
    parts = [_parts(layer, x) for layer in (mlp.gate_proj, mlp.up_proj)]
    return products(x, parts) if go_together(parts) else (mlp.gate_proj(x), mlp.up_proj(x))


def _parts(layer: nn.Module, x: Tensor) -> Adapted | None:
    # A hook is part of what the layer computes: peft's for one adapter per row hands its choice over in one.
    return None if layer._forward_pre_hooks or layer._forward_hooks else adapted(layer, x)


def activation_of(mlp: nn.Module) -> Activation | None:
    """The activation of a gated MLP, if it is known."""
    function = mlp.activation_fn if hasattr(mlp, "gate_up_proj") else mlp.act_fn
    if type(function) in (SiLUActivation, nn.SiLU):
        return SILU
    # The other kind of GELUTanh is a Python function of its own roundings.
    return GELU_TANH if type(function) is GELUTanh and isinstance(function.act, functools.partial) else None
