"""token_logps against plain whole logits: values, gradients, every kind of head, any chunk; and its error budget."""

import os
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch

from lite.loss.head import Head, LowRank, token_logps
from tests.loss.heads import BENDS, KINDS, N, assert_within_naive_bf16, make, peak_bytes, plain_logps, wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "softcap"), BENDS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_equals_plain_whole_logits_in_fp64(kind: str, scale: float, softcap: float | None, chunk_tokens: int):
    hidden, head, labels = make(kind, scale=scale, softcap=softcap)
    coefficients = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, ours = plain_logps(hidden, head, labels), token_logps(hidden, head, labels, chunk_tokens=chunk_tokens)
    assert torch.allclose(ours, plain, rtol=1e-12, atol=1e-12)
    expected, found = (torch.autograd.grad(logps, wanted(hidden, head), coefficients) for logps in (plain, ours))
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_errs_no_more_than_the_naive_bf16_path(kind: str):
    ours = partial(token_logps, chunk_tokens=10)
    assert_within_naive_bf16(kind, lambda: torch.randint(501, (32,)), plain_logps, ours)


def test_without_gradient_nothing_is_kept():
    hidden, head, labels = make("frozen")
    with torch.no_grad():
        logps = token_logps(hidden, head, labels, chunk_tokens=5)
    assert not logps.requires_grad
    assert torch.allclose(logps, plain_logps(hidden, head, labels).detach())
    assert torch.equal(logps, token_logps(hidden, head, labels, chunk_tokens=5))


def test_without_gradient_no_rows_are_made_though_hidden_wants_them():
    """(N, D) rows would be four times the chunk of logits here."""
    tokens, width, words, chunk = 256, 512, 1024, 32
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(words, width)
    labels = torch.randint(words, (tokens,))
    with torch.no_grad():
        peak = peak_bytes(lambda: token_logps(hidden, Head(weight), labels, chunk_tokens=chunk))
    assert peak <= 1.1 * chunk * words * 4 + tokens * 8


def test_no_tokens_have_no_logps_and_no_gradient():
    hidden = torch.zeros(0, 4, requires_grad=True)
    logps = token_logps(hidden, Head(torch.zeros(5, 4)), torch.zeros(0, dtype=torch.long), chunk_tokens=3)
    logps.sum().backward()
    assert logps.shape == (0,)
    assert hidden.grad.shape == (0, 4)


def test_certain_and_impossible_labels_stay_finite():
    """A logit of 1,000 above the rest: logp 0 for it and −1,000 for the others, and no NaN in the gradient."""
    weight = torch.zeros(3, 2)
    weight[0, 0] = 1000.0
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    logps = token_logps(hidden, Head(weight), torch.tensor([0, 1]), chunk_tokens=5)
    logps.sum().backward()
    assert logps.tolist() == [0.0, -1000.0]
    assert hidden.grad.isfinite().all()


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"hidden \(2, 3\), weight \(5, 4\)"):
        token_logps(torch.zeros(2, 3), Head(torch.zeros(5, 4)), torch.zeros(2, dtype=torch.long), chunk_tokens=5)


def test_memory_is_a_chunk_and_the_rows():
    """Live bytes inside forward: a chunk of fp32 logits, its copies, and (N, D) rows."""
    tokens, width, words, chunk = 512, 64, 4096, 32
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(words, width)
    labels = torch.randint(words, (tokens,))
    peak = peak_bytes(lambda: token_logps(hidden, Head(weight), labels, chunk_tokens=chunk))
    rows, logits = tokens * width * 4, chunk * words * 4
    assert rows + logits <= peak <= rows + 1.1 * logits + tokens * 8


@pytest.mark.slow
def test_ligers_kernel_equals_the_plain_twin_in_tritons_interpreter():
    """To be chosen before triton is imported, hence a process of its own; it cannot take a softcap (gpu test)."""
    pytest.importorskip("liger_kernel")
    program = """
        import torch
        from lite.loss.head import Head, token_logps
        torch.manual_seed(0)
        for scale in (1.0, 0.5):
            results = []
            for kernel in ("plain", "liger"):
                torch.manual_seed(0)
                hidden = torch.randn(5, 8, requires_grad=True)
                head = Head(torch.randn(50, 8), scale=scale)
                logps = token_logps(hidden, head, torch.randint(50, (5,)), chunk_tokens=2, kernel=kernel)
                results.append((logps.detach(), *torch.autograd.grad(logps.sum(), hidden)))
            for plain, liger in zip(*results):
                assert torch.allclose(plain, liger, rtol=1e-5, atol=1e-5), (plain - liger).abs().max()
        print("equal")
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    outcome = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment, check=False
    )
    assert outcome.stdout.strip() == "equal", outcome.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.125, None), (1.0, 30.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_ligers_kernel_equals_the_plain_twin_on_cuda(kind: str, scale: float, softcap: float | None):
    """bf16, a vocabulary of 151,936: the same values and gradients, to fp32 rounding of the softmax."""
    pytest.importorskip("liger_kernel")
    trained, low_rank = KINDS[kind]["trained"], KINDS[kind]["low_rank"]
    torch.manual_seed(0)
    draw = {"device": "cuda", "dtype": torch.bfloat16}
    hidden, weight = torch.randn(300, 256, **draw), torch.randn(151_936, 256, **draw) * 0.1
    a, b = torch.randn(8, 256, **draw) * 0.1, torch.randn(151_936, 8, **draw) * 0.1
    labels = torch.randint(151_936, (300,), device="cuda")
    outcomes = []
    for kernel in ("plain", "liger"):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        adapter = LowRank(a.clone().requires_grad_(), b.clone().requires_grad_(), 0.5) if low_rank else None
        head = Head(w, None, scale, softcap, adapter)
        logps = token_logps(h, head, labels, chunk_tokens=128, kernel=kernel)
        outcomes.append([logps.detach(), *torch.autograd.grad(logps.sum(), wanted(h, head))])
    for plain, liger in zip(*outcomes, strict=True):
        assert float((plain - liger).float().norm() / plain.float().norm()) < 2e-3  # half a bf16 step
    assert torch.allclose(outcomes[0][0], outcomes[1][0], rtol=1e-5, atol=1e-5)
