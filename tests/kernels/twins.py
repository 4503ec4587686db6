"""Plain twins of the kernels: torch's own operators with their roundings, and the same in fp64, which is the truth."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
EPSILON = 1e-6


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """With transformers' roundings; of fp64 with none."""
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype)


def gated(activation: str) -> Callable[[Tensor, Tensor], Tensor]:
    """As torch computes it in two steps."""
    return lambda gate, up: ACTIVATIONS[activation](gate) * up


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' own."""
    return apply_rotary_pos_emb(x, x, cos, sin)[0]


def gradients(compute: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """The result of `compute(*inputs)` and the inputs' gradients by autograd."""
    inputs = [one.detach().clone().requires_grad_() for one in inputs]
    result = compute(*inputs)
    return [result.detach(), *torch.autograd.grad(result, inputs, upstream.to(result.dtype))]


def both(compute: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> tuple[list[Tensor], ...]:
    """`gradients` in the inputs' dtype, and in fp64."""
    return gradients(compute, inputs, upstream), gradients(compute, [one.double() for one in inputs], upstream)


def assert_within(ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], *, slack: float) -> None:
    """Against the exact result each is at most 5 % further off than the plain twin, and `slack` of its size."""
    for mine, naive, true in zip(ours, plain, exact, strict=True):
        assert (mine.shape, mine.dtype) == (naive.shape, naive.dtype)
        assert mine.isfinite().all()
        errors = [float((one.double() - true).norm()) for one in (mine, naive)]
        assert errors[0] <= 1.05 * errors[1] + slack * float(true.norm()), errors
