"""A Matrix on random numbers, and the gradient that autograd would have made."""

import torch
from torch import Tensor, nn

from lite.optim import blocks, subspace
from lite.optim.matrix import Matrix

RANK = 4
SHAPES = {"wide": (9, 14), "tall": (14, 9), "square": (9, 9)}  # (out, in)
CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def matrix(out: int, width: int, *, dtype: torch.dtype = torch.float32, seed: int = 0, bits: int = 0) -> Matrix:
    """With a random basis; bits = 8: codes and scales."""
    weight = normal(out, width, seed=seed, dtype=dtype)
    if bits == 8:
        codes, scale = blocks.quantised(weight)
        made = Matrix(nn.Parameter(codes, requires_grad=False), scale)
    else:
        made = Matrix(nn.Parameter(weight))
    made.basis = subspace.at_random(made.short, RANK, CPU, generator(7)).to(dtype)
    return made


def sketching(made: Matrix, width: int = 6) -> Tensor:
    """Let it sketch; Ω (n, width)."""
    omega = normal(made.long, width, seed=8, dtype=made.exact)
    made.gather("sketch", lambda: omega)
    return omega


def canonical(made: Matrix, gradient: Tensor) -> Tensor:
    """The gradient of W with its shorter side first."""
    return gradient.t() if made.transposed else gradient


def assert_taken(made: Matrix, gradient: Tensor, omega: Tensor, tolerance: float = 1e-12) -> None:
    """R and Y are those of the full gradient of W."""
    g = canonical(made, gradient)
    torch.testing.assert_close(made.gradient, made.basis.t() @ g, rtol=tolerance, atol=tolerance * 100)
    torch.testing.assert_close(made.gathered, g @ omega, rtol=tolerance, atol=tolerance * 100)
