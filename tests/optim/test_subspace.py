"""Subspaces: how much they capture, and moments that go over to new ones, derived by hand."""

import math

import pytest
import torch
from torch import Tensor

from lite.optim import subspace

FP64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradient(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """(m, n) fp32 with these singular values."""
    draws = generator(seed)
    left = torch.linalg.qr(torch.randn(m, len(values), generator=draws, dtype=FP64)).Q
    right = torch.linalg.qr(torch.randn(n, len(values), generator=draws, dtype=FP64)).Q
    return ((left * values) @ right.t()).float()


def sketch(g: Tensor, rank: int, seed: int = 1) -> Tensor:
    width = subspace.sketch_width(rank, len(g))
    return g @ subspace.normal((g.shape[1], width), torch.float32, g.device, generator(seed))


def found_by(how: str, g: Tensor, rank: int) -> Tensor:
    return subspace.from_sketch(sketch(g, rank), rank) if how == "sketch" else subspace.from_gradient(g, rank, how)


def missed(g: Tensor, basis: Tensor) -> float:
    """‖G − PPᵀG‖², in fp64."""
    g, basis = g.double(), basis.double()
    return (g - basis @ (basis.t() @ g)).square().sum().item()


def assert_orthonormal(basis: Tensor) -> None:
    torch.testing.assert_close(basis.t() @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_sketch_misses_no_more_than_theory_says(power: float):
    """Halko et al. 2011, theorem 10.5: E ‖G − QQᵀG‖² ≤ (1 + r / (p − 1)) Σ_{j>r} σ_j², Q of all r + p columns.

    P has the best r of these only; by the triangle of best approximations (their theorem 9.3, squared sums) it misses
    at most that and Σ_{j>r} σ_j² more. The mean over 20 sketches is well within, and never better than the SVD.
    """
    rank = 16
    values = torch.arange(1, 65, dtype=FP64) ** -power
    g = gradient(64, 150, values)
    tail = values[rank:].square().sum().item()
    ratios = [missed(g, subspace.from_sketch(sketch(g, rank, seed), rank)) / tail for seed in range(20)]
    assert min(ratios) >= 1 - 1e-4
    assert sum(ratios) / len(ratios) <= 2 + rank / (subspace.OVERSAMPLING - 1)
    at_random = missed(g, subspace.at_random(64, rank, g.device, generator())) / tail
    assert max(ratios) < at_random
    cut = [missed(g, torch.linalg.qr(sketch(g, rank, seed)).Q[:, :rank]) / tail for seed in range(20)]
    assert sum(ratios) < sum(cut)  # what the oversampling is for


@pytest.mark.parametrize("how", ["sketch", "svd", "eigh"])
def test_of_a_gradient_of_low_rank_nothing_is_missed(how: str):
    g = gradient(40, 90, torch.tensor([5.0, 3.0, 1.0, 0.5], dtype=FP64))
    basis = found_by(how, g, 4)
    assert basis.shape == (40, 4)
    assert_orthonormal(basis)
    assert missed(g, basis) <= 1e-8 * g.square().sum().item()
    exact = torch.linalg.svd(g, full_matrices=False).U[:, :4]
    assert abs(subspace.overlap(basis, exact).item() - 1) < 1e-5


def test_eigenvectors_are_singular_vectors_but_for_the_sign():
    g = gradient(30, 70, torch.linspace(3, 1, 30, dtype=FP64))
    one, other = found_by("svd", g, 10), found_by("eigh", g, 10)
    torch.testing.assert_close((one * other).sum(0).abs(), torch.ones(10), atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", ["sketch", "svd", "eigh"])
def test_of_no_gradient_any_directions_will_do(how: str):
    assert_orthonormal(found_by(how, torch.zeros(12, 30), 4))


def test_at_random_is_orthonormal_and_each_direction_as_likely():
    """Of a fixed unit vector P sees r / m on average: over 400 draws within 5 standard errors."""
    seen = []
    for seed in range(400):
        basis = subspace.at_random(10, 3, torch.device("cpu"), generator(seed))
        seen.append(basis[0].square().sum().item())
    assert_orthonormal(basis)
    seen = torch.tensor(seen)
    assert abs(seen.mean() - 0.3) < 5 * seen.std() / math.sqrt(400)


def test_a_sketch_is_as_wide_as_the_gradient_at_most():
    assert subspace.sketch_width(16, 100) == 24
    assert subspace.sketch_width(16, 20) == 20


def test_overlap_by_hand():
    """In four dimensions two planes share half by chance, as those of axes (1, 2) and (2, 3) do."""
    eye = torch.eye(4)
    assert subspace.overlap(eye[:, :2], eye[:, :2]).item() == 1.0
    assert subspace.overlap(eye[:, :2], eye[:, 1:3]).item() == 0.0
    assert subspace.overlap(eye[:, :2], eye[:, 2:]).item() == -1.0


def test_random_subspaces_overlap_by_nothing_on_average():
    draws = [subspace.at_random(20, 8, torch.device("cpu"), torch.Generator().manual_seed(seed)) for seed in range(60)]
    found = torch.stack([subspace.overlap(one, other) for one, other in zip(draws[::2], draws[1::2], strict=True)])
    assert abs(found.mean().item()) < 4 * found.std().item() / 30**0.5


def test_a_plane_turned_in_itself_by_hand():
    """P_new = P_old Tᵀ with T = ((c, s), (−s, c)): then C = Pᵀ_new P_old = T.

    m = (1, 2) becomes (c + 2 s, −s + 2 c); v = (4, 1) becomes (4 c² + s², 4 s² + c²), and nothing is unseen.
    """
    c, s = 0.6, 0.8
    old = torch.eye(5, dtype=FP64)[:, :2]
    new = old @ torch.tensor([[c, s], [-s, c]], dtype=FP64).t()
    first, second = torch.tensor([[1.0], [2.0]], dtype=FP64), torch.tensor([[4.0], [1.0]], dtype=FP64)
    first, second = subspace.rotated(first, second, old, new)
    torch.testing.assert_close(first, torch.tensor([[c + 2 * s], [-s + 2 * c]], dtype=FP64))
    torch.testing.assert_close(second, torch.tensor([[4 * c * c + s * s], [4 * s * s + c * c]], dtype=FP64))


def test_new_directions_get_the_mean_by_hand():
    """Old axes 1 and 2, new ones 2 and 3: what was the second is the first; of the other nothing is known.

    Columns apart: v = ((4, 8), (1, 2)) becomes ((1, 2), (2.5, 5)), m = ((1, −1), (2, −2)) becomes ((2, −2), (0, 0)).
    """
    eye = torch.eye(3)
    first, second = torch.tensor([[1.0, -1.0], [2.0, -2.0]]), torch.tensor([[4.0, 8.0], [1.0, 2.0]])
    first, second = subspace.rotated(first, second, eye[:, :2], eye[:, 1:])
    assert first.tolist() == [[2.0, -2.0], [0.0, 0.0]]
    assert second.tolist() == [[1.0, 2.0], [2.5, 5.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_stay_where_the_subspace_does(dtype: torch.dtype):
    basis = subspace.at_random(30, 6, torch.device("cpu"), generator()).to(dtype)
    first, second = torch.randn(6, 20, generator=generator(1)), torch.rand(6, 20, generator=generator(2))
    found = subspace.rotated(first, second, basis, basis)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[0], first, atol=3 * tolerance, rtol=tolerance)
    torch.testing.assert_close(found[1], second, atol=3 * tolerance, rtol=tolerance)


def test_no_second_moment_is_negative_or_beyond_the_largest():
    for seed in range(20):
        old, new = (subspace.at_random(9, 5, torch.device("cpu"), generator(seed + i)) for i in (0, 100))
        second = torch.rand(5, 11, generator=generator(seed)).square()
        second[:, 0] = 0
        _, found = subspace.rotated(torch.zeros(5, 11), second, old, new)
        assert (found >= 0).all()
        assert (found[:, 0] == 0).all()
        assert (found <= second.amax(0) * 1.00001).all()
