"""A trained matrix: updates as they are stored, and updates that wait."""

import pytest
import torch
from torch import Tensor

from lite.optim.matrix import Matrix
from tests.optim.fed import RANK, SHAPES, canonical, generator, matrix, normal

FP64 = torch.float64


def dense(made: Matrix, change: Tensor) -> Tensor:
    """P change as W lies."""
    return canonical(made, made.basis.to(change.dtype) @ change)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("chunk", [1, 40, 10**6])
def test_an_update_is_the_dense_one_in_any_chunks(shape: tuple, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lite.optim.matrix.CHUNK", chunk)
    made = matrix(*shape, dtype=FP64)
    change, before = normal(RANK, made.long, seed=1, dtype=FP64), made.weight.detach().clone()
    made.update(change, 0.9, None)
    torch.testing.assert_close(made.weight.detach(), 0.9 * before + dense(made, change), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_without_a_basis_the_change_is_the_whole_one(shape: tuple, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lite.optim.matrix.CHUNK", 30)
    made = matrix(*shape, dtype=FP64)
    made.basis = None
    change, before = normal(*made.canonical_shape, seed=1, dtype=FP64), made.weight.detach().clone()
    made.update(change, 0.9, None)
    torch.testing.assert_close(made.weight.detach(), 0.9 * before + canonical(made, change), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_bf16_weight_is_updated_in_fp32_and_rounded_to_a_neighbour(shape: tuple):
    made = matrix(*shape, dtype=torch.bfloat16)
    change = normal(RANK, made.long, seed=1) * 0.01
    exact = 0.9 * made.weight.detach().float() + dense(made, change)
    made.update(change, 0.9, generator())
    gap = (made.weight.detach().float() - exact).abs()
    assert (gap <= exact.abs() * 2**-7).all()
    assert not torch.equal(made.weight.detach(), exact.bfloat16())  # not all to the nearest


def merged(made: Matrix, kept: float) -> Tensor:
    """kept · (what is stored) + P A in fp64, from nothing but the parts."""
    pending = made.pending
    made.pending = None
    stored = made.rows(0, len(made.weight)).double()
    made.pending = pending
    return kept * stored + dense(made, pending.double())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "bits"), [(FP64, 0), (torch.float32, 0), (torch.bfloat16, 0), (torch.float32, 8)])
def test_with_what_waits_a_matrix_computes_as_the_merged_dense_one(shape: tuple, dtype: torch.dtype, bits: int):
    """Two changes wait, each after a decay of 0.9: W ← 0.9 (0.9 W + P c₁) + P c₂."""
    made = matrix(*shape, dtype=dtype, bits=bits)
    start = made.rows(0, shape[0]).double()
    stored = made.weight.detach().clone()
    first, second = (normal(RANK, made.long, seed=seed, dtype=made.exact) for seed in (1, 2))
    made.wait(first, 0.9)
    made.wait(second, 0.9)
    assert torch.equal(made.weight.detach(), stored)  # nothing is rounded yet
    expected = 0.9 * (0.9 * start + dense(made, first.double())) + dense(made, second.double())
    tolerance = {FP64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    torch.testing.assert_close(merged(made, 0.81), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(made.rows(2, 7).double(), expected[2:7], rtol=tolerance, atol=tolerance)
    x, grad = normal(5, shape[1], seed=3, dtype=dtype), normal(5, shape[0], seed=4, dtype=dtype)
    bias = normal(shape[0], seed=5, dtype=dtype)
    coarse = 0.05 if dtype == torch.bfloat16 else tolerance * 10
    for found, plain in (
        (made.product(x), x.double() @ expected.t()),
        (made.product(x, bias), x.double() @ expected.t() + bias.double()),
        (made.back(grad), grad.double() @ expected),
    ):
        assert found.dtype == dtype
        assert (found.double() - plain).norm() <= coarse * plain.norm()
    made.merge(generator())
    assert made.pending is None
    assert made.kept == 1.0
    now = made.rows(0, shape[0]).double()
    rounding = expected.abs() * 2**-7 if dtype == torch.bfloat16 else tolerance * 10
    assert ((now - expected).abs() <= (expected.abs().max() / 127 * 1.001 if bits else rounding)).all()
    torch.testing.assert_close(made.product(x).double(), x.double() @ now.t(), rtol=0.05, atol=0.2)


def test_merging_what_does_not_wait_changes_nothing():
    made = matrix(9, 14)
    before = made.weight.detach().clone()
    made.merge(generator())
    assert torch.equal(made.weight.detach(), before)
