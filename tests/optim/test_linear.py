"""What trained layers feed to their matrices is the projection, and the sketch, of the gradient that autograd makes."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lite.loss.head import Head, token_logps
from lite.optim.linear import trained_embedding, trained_linear
from lite.optim.matrix import Matrix
from tests.loss.heads import BENDS, plain_logps
from tests.optim.fed import RANK, SHAPES, assert_taken, canonical, matrix, normal, sketching

FP64 = torch.float64


def twin(made: Matrix) -> Tensor:
    return made.weight.detach().clone().requires_grad_()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape: tuple, bias: bool):
    made, x = matrix(*shape, dtype=FP64), normal(2, 5, shape[1], seed=1, dtype=FP64).requires_grad_()
    omega, weight = sketching(made), twin(made)
    added = normal(shape[0], seed=2, dtype=FP64).requires_grad_() if bias else None
    found, expected = trained_linear(x, made, added), F.linear(x, weight, added)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = [x, *([added] if bias else [])]
    plain = torch.autograd.grad(expected.sin().sum(), [*wanted, weight])
    found.sin().sum().backward()
    assert made.weight.grad is None
    for one, other in zip(wanted, plain, strict=False):
        torch.testing.assert_close(one.grad, other, rtol=1e-12, atol=1e-12)
    assert_taken(made, plain[-1], omega)


@pytest.mark.parametrize("shape", [(3, 14), (14, 3)])
def test_a_matrix_without_a_basis_takes_the_whole_gradient(shape: tuple):
    made, x = matrix(*shape, dtype=FP64, seed=3), normal(5, shape[1], seed=1, dtype=FP64)
    made.basis, weight = None, twin(made)
    trained_linear(x, made).sin().sum().backward()
    (plain,) = torch.autograd.grad(F.linear(x, weight).sin().sum(), weight)
    torch.testing.assert_close(made.gradient, canonical(made, plain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_eight_bits(shape: tuple):
    """By the weight that the codes stand for, which is no leaf of any graph."""
    made, x = matrix(*shape, bits=8), normal(5, shape[1], seed=1)
    omega, weight = sketching(made), made.rows(0, shape[0]).requires_grad_()
    x.requires_grad_()
    (of_x, plain) = torch.autograd.grad(F.linear(x, weight).sin().sum(), (x, weight))
    trained_linear(x, made).sin().sum().backward()
    torch.testing.assert_close(x.grad, of_x)
    assert_taken(made, plain, omega, 1e-5)


@pytest.mark.parametrize("shape", [(37, 9), (7, 9), (9, 9)], ids=["words", "few words", "square"])
@pytest.mark.parametrize("whole", [False, True])
def test_embedding(shape: tuple, whole: bool):
    """Ids that come again, and words that never come."""
    made, ids = matrix(*shape, dtype=FP64), torch.tensor([[0, 3, 3], [6, 0, 3]])
    weight, omega = twin(made), sketching(made)
    if whole:
        made.gather("whole")
    found, expected = trained_embedding(ids, made), F.embedding(ids, weight)
    assert torch.equal(found, expected)
    for _ in range(2):
        trained_embedding(ids, made).sin().sum().backward()
    (plain,) = torch.autograd.grad(2 * expected.sin().sum(), weight)
    if whole:
        torch.testing.assert_close(made.gathered, canonical(made, plain), rtol=1e-12, atol=1e-12)
    else:
        assert_taken(made, plain, omega)


@pytest.mark.parametrize("shape", [(37, 9), (7, 9), (9, 9)], ids=["words", "few words", "square"])
@pytest.mark.parametrize(("scale", "softcap"), BENDS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk_tokens", [2, 100])
def test_head(shape: tuple, scale: float, softcap: float | None, tied: bool, chunk_tokens: int):
    """Chunk by chunk; tied, the embedding's rows come to the same R and Y."""
    made = matrix(*shape, dtype=FP64)
    omega, weight = sketching(made), twin(made)
    ids, labels = torch.arange(11) % 7, torch.arange(11).flip(0) % 6
    bias = normal(shape[0], seed=3, dtype=FP64).requires_grad_()
    hidden = normal(11, shape[1], seed=2, dtype=FP64).requires_grad_()
    coefficients = normal(11, seed=4, dtype=FP64)

    def loss(embed: Callable[[Tensor], Tensor], logps: Callable[[Tensor], Tensor]) -> Tensor:
        return logps((hidden + embed(ids) if tied else hidden).tanh()) @ coefficients

    head = Head(made.weight, bias, scale, softcap, take=made.take)
    loss(
        lambda ids: trained_embedding(ids, made), lambda h: token_logps(h, head, labels, chunk_tokens=chunk_tokens)
    ).backward()
    plain_head = Head(weight, bias, scale, softcap)
    expected = loss(lambda ids: F.embedding(ids, weight), lambda h: plain_logps(h, plain_head, labels))
    plain = torch.autograd.grad(expected, (weight, hidden, bias))
    assert made.weight.grad is None
    torch.testing.assert_close(hidden.grad, plain[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bias.grad, plain[2], rtol=1e-10, atol=1e-12)
    assert_taken(made, plain[0], omega, 1e-10)


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("recomputed", [False, True])
def test_recomputed_layers_and_tiles_of_tokens_add_up_once(tiles: int, recomputed: bool):
    up, down = matrix(14, 9, dtype=FP64), matrix(9, 14, dtype=FP64, seed=1)
    omegas, weights = [sketching(m) for m in (up, down)], [twin(m) for m in (up, down)]
    x = normal(12, 9, seed=2, dtype=FP64).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return trained_linear(trained_linear(x, up).tanh(), down)

    run = functools.partial(checkpoint, layer, use_reentrant=False) if recomputed else layer
    torch.cat([run(part) for part in x.chunk(tiles)]).sin().sum().backward()
    plain = torch.autograd.grad(F.linear(F.linear(x, weights[0]).tanh(), weights[1]).sin().sum(), weights)
    for made, omega, gradient in zip((up, down), omegas, plain, strict=True):
        assert_taken(made, gradient, omega)


@pytest.mark.parametrize("kind", ["linear", "embedding", "head"])
def test_bf16_errs_no_more_than_autograds_bf16_gradient_that_is_projected_then(kind: str):
    """RMS error of R against fp32's over 20 draws: at most 1.1 times that of PᵀG, G as autograd rounds it to bf16."""
    squares = []
    for seed in range(20):
        wide = normal(60, 48, seed=seed).bfloat16()
        x, ids = normal(64, 48, seed=seed + 100).bfloat16(), torch.arange(64) % 50
        made = Matrix(nn.Parameter(wide.clone()))
        made.basis = torch.linalg.qr(normal(48, RANK, seed=seed + 200)).Q.bfloat16()

        def loss(weight: Tensor, matrix: Matrix | None, x: Tensor = x, ids: Tensor = ids) -> Tensor:
            if kind == "head":
                take = None if matrix is None else matrix.take
                logps = token_logps(x.to(weight.dtype), Head(weight, take=take), ids, chunk_tokens=16)
                return logps.sum() / 37
            if kind == "embedding":
                rows = F.embedding(ids, weight) if matrix is None else trained_embedding(ids, matrix)
                return (rows * x).float().sin().sum() / 37
            flat = x.to(weight.dtype)
            out = F.linear(flat, weight) if matrix is None else trained_linear(flat, matrix)
            return (out.float() / 10).sin().sum() / 37

        found = []
        for dtype in (torch.float32, torch.bfloat16):
            weight = wide.to(dtype).requires_grad_()
            (plain,) = torch.autograd.grad(loss(weight, None), weight)
            found.append(made.basis.float().t() @ plain.t().float())
        loss(made.weight, made).backward()
        squares.append([(r - found[0]).square().mean().item() for r in (found[1], made.gradient)])
    naive, ours = torch.tensor(squares).mean(0).sqrt().tolist()
    assert naive > 0
    assert ours <= 1.1 * naive
