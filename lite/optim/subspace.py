"""Subspaces: which few directions of a gradient are kept, how they are found, and how moments go over to new ones.

G is (m, n) with m ≤ n; P (m, r) has orthonormal columns, and PᵀG (r, n) is what the optimizer sees of it. The best P
are the left singular vectors of the gradients to come, which nobody knows; those of a sketch Y = GΩ come within a few
percent of those of G itself, at a fraction of the price, and Y adds up over packs and steps as G would.
Source: GaLore, Zhao et al. 2024, arXiv:2403.03507; the sketch is the range finder of Halko et al. 2011,
arXiv:0909.4061.
"""

from typing import Literal

import torch
from torch import Tensor

Projection = Literal["sketch", "svd", "eigh", "random"]
OVERSAMPLING = 8  # columns of a sketch beyond the rank


def sketch_width(rank: int, short: int) -> int:
    """Columns of Ω: the rank and some more, never more than G has rows."""
    return min(rank + OVERSAMPLING, short)


def from_sketch(sketch: Tensor, rank: int) -> Tensor:
    """P (m, r): the first left singular vectors of Y (m, s).

    By QR and those of its small factor, eigenvectors in fp64 of what it is squared: the first r columns of Q alone
    would waste the oversampling.
    """
    q, small = torch.linalg.qr(sketch)
    small = small.double()
    turn = torch.linalg.eigh(small @ small.t()).eigenvectors[:, -rank:].flip(1)
    return q @ turn.to(q.dtype)


def from_gradient(gradient: Tensor, rank: int, how: Literal["svd", "eigh"]) -> Tensor:
    """P (m, r): the first left singular vectors of G (m, n) in fp32, by its SVD or the eigenvectors of GGᵀ."""
    if how == "svd":
        return torch.linalg.svd(gradient, full_matrices=False).U[:, :rank]
    return torch.linalg.eigh(gradient @ gradient.t()).eigenvectors[:, -rank:].flip(1)


def at_random(short: int, rank: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """P (m, r) fp32, uniform among all such: the orthogonal factor of normal numbers."""
    return torch.linalg.qr(normal((short, rank), torch.float32, device, generator)).Q


def normal(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Standard normal numbers; on meta, where there are none, room for them."""
    drawn = torch.empty(shape, dtype=dtype, device=device)
    return drawn if drawn.is_meta else drawn.normal_(generator=generator)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """How much of a subspace another holds, beyond chance, () fp32: 1 of the same, on average 0 of random ones.

    With s = ‖P₁ᵀP₂‖² / r, of which chance alone gives r/m: (s − r/m) / (1 − r/m).
    """
    short, rank = one.shape
    chance = rank / short
    return ((one.float().t() @ other.float()).square().sum() / rank - chance) / (1 - chance)


def rotated(first: Tensor, second: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments (r, n) fp32, of Pᵀ_old G, as those of Pᵀ_new G, as far as they can be told.

    With C = Pᵀ_new P_old: M ← C M. Of the second moments only the diagonal is known, so V ← (C∘C) V, the variance of
    a sum of independent directions; the part of a new direction that lay in no old one, 1 − Σ C², gets their mean.
    """
    turn = new.to(first.dtype).t() @ old.to(first.dtype)  # (r, r)
    shares = turn.square()
    unseen = (1 - shares.sum(1, keepdim=True)).clamp_(min=0)
    mean = second.mean(0, keepdim=True)
    return turn @ first, (shares @ second).addcmul_(unseen, mean)
