"""top_logps and logps_and_purity: what else one pass over the logits gives."""

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from lite.loss.head import Head, logps_and_purity, token_logps, top_logps
from tests.loss.heads import BENDS, KINDS, N, V, make, peak_bytes, wanted, whole_log_softmax

HALVES = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]]).log()  # as a hidden state before an identity head


def test_top_by_hand():
    """q = ½ ¼ ⅛ ⅛: the label, word 2, has log ⅛, and the two likeliest words are 0 and 1."""
    logps, top, ids = top_logps(HALVES, Head(torch.eye(4)), torch.tensor([2]), 2, chunk_tokens=5)
    assert torch.allclose(logps, torch.tensor([1 / 8]).log())
    assert torch.allclose(top, torch.tensor([[1 / 2, 1 / 4]]).log())
    assert ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "softcap"), BENDS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_top_equals_that_of_the_whole_log_softmax(kind: str, scale: float, softcap: float | None, chunk_tokens: int):
    hidden, head, labels = make(kind, scale=scale, softcap=softcap)
    logps, top, ids = top_logps(hidden, head, labels, 5, chunk_tokens=chunk_tokens)
    expected = whole_log_softmax(hidden, head).topk(5)
    assert not top.requires_grad
    assert torch.allclose(top, expected.values, rtol=1e-12, atol=1e-12)
    assert torch.equal(ids, expected.indices)
    assert torch.equal(logps, token_logps(hidden, head, labels, chunk_tokens=chunk_tokens).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "softcap"), BENDS)
def test_labels_are_those_of_token_logps_bit_for_bit(dtype: torch.dtype, scale: float, softcap: float | None):
    """And a label that is among the top has the same bits there."""
    hidden, head, labels = make("frozen", dtype=dtype, scale=scale, softcap=softcap)
    with torch.no_grad():
        expected = token_logps(hidden, head, labels, chunk_tokens=5)
    logps, top, ids = top_logps(hidden, head, labels, V, chunk_tokens=5)
    assert logps.dtype == top.dtype == torch.float32
    assert torch.equal(logps, expected)
    assert torch.equal(top.gather(1, (ids == labels[:, None]).int().argmax(1, keepdim=True))[:, 0], expected)
    assert (top.diff(dim=1) <= 0).all()
    assert torch.allclose(top.exp().sum(1), torch.ones(N))


def test_memory_of_the_top_is_a_chunk_and_the_results():
    tokens, width, words, chunk, k = 512, 64, 4096, 32, 8
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(words, width)
    labels = torch.randint(words, (tokens,))
    peak = peak_bytes(lambda: top_logps(hidden, Head(weight), labels, k, chunk_tokens=chunk))
    assert peak <= 1.1 * chunk * words * 4 + 2 * tokens * (k * 12 + 4)


@pytest.mark.parametrize("k", [0, 6])
def test_k_beyond_the_vocabulary_is_refused(k: int):
    with pytest.raises(ValueError, match=f"k = {k}; expected 1 … 5"):
        top_logps(torch.zeros(2, 4), Head(torch.zeros(5, 4)), torch.zeros(2, dtype=torch.long), k, chunk_tokens=5)


def test_purity_by_hand():
    """q = ½ ¼ ⅛ ⅛: Σ q² = ¼ + 1/16 + 2/64 = 11/32; of four equal words ¼; of certainty 1."""
    hidden = torch.stack([HALVES[0], torch.zeros(4), torch.tensor([1000.0, 0, 0, 0])])
    logps, purity = logps_and_purity(hidden, Head(torch.eye(4)), torch.tensor([1, 3, 0]), chunk_tokens=5)
    assert torch.allclose(purity, torch.tensor([math.log(11 / 32), math.log(1 / 4), 0]))
    assert torch.allclose(logps, torch.tensor([math.log(1 / 4), math.log(1 / 4), 0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "softcap"), BENDS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_purity_equals_that_of_the_whole_log_softmax(kind: str, scale: float, softcap: float | None, chunk_tokens: int):
    hidden, head, labels = make(kind, scale=scale, softcap=softcap)
    _, purity = logps_and_purity(hidden, head, labels, chunk_tokens=chunk_tokens)
    assert torch.allclose(purity, (2 * whole_log_softmax(hidden, head)).logsumexp(1), rtol=1e-12, atol=1e-12)
    assert not purity.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "softcap"), BENDS)
def test_purity_leaves_logps_and_gradient_alone_bit_for_bit(
    kind: str, dtype: torch.dtype, scale: float, softcap: float | None
):
    hidden, head, labels = make(kind, dtype=dtype, scale=scale, softcap=softcap)
    coefficients = torch.randn(N, generator=torch.Generator().manual_seed(1))
    bare = token_logps(hidden, head, labels, chunk_tokens=5)
    logps, purity = logps_and_purity(hidden, head, labels, chunk_tokens=5)
    assert torch.equal(logps, bare)
    expected = torch.autograd.grad(bare, wanted(hidden, head), coefficients)
    found = torch.autograd.grad(logps, wanted(hidden, head), coefficients)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    with torch.no_grad():
        again = logps_and_purity(hidden, head, labels, chunk_tokens=5)
    assert torch.equal(again.purity, purity)


def test_purity_of_150_000_words_in_fp32_is_good_to_1e_4():
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(151_936, 16, generator=torch.Generator().manual_seed(1))
    _, purity = logps_and_purity(hidden, Head(weight), torch.zeros(4, dtype=torch.long), chunk_tokens=4)
    exact = (2 * whole_log_softmax(hidden.double(), Head(weight.double()))).logsumexp(1)
    assert torch.allclose(purity.double(), exact, rtol=0, atol=1e-4)


def test_weighing_by_purity_reaches_the_gradient_through_logps_alone():
    """WPO's weight exp(logp − purity) is a constant: d / d hidden is that of the weighted logps."""
    for kind in KINDS:
        hidden, head, labels = make(kind)
        logps, purity = logps_and_purity(hidden, head, labels, chunk_tokens=4)
        weight = (logps.detach() - purity).exp()
        found = torch.autograd.grad((weight * logps).sum(), wanted(hidden, head))
        plain = whole_log_softmax(hidden, head)
        of_labels = plain.gather(1, labels[:, None])[:, 0]
        weight = (of_labels - (2 * plain).logsumexp(1)).exp().detach()
        expected = torch.autograd.grad((weight * of_labels).sum(), wanted(hidden, head))
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("compute", [logps_and_purity, lambda *a, **k: top_logps(*a, 1, **k)])
def test_shapes_that_do_not_fit_are_named(compute):
    with pytest.raises(ValueError, match=r"hidden \(2, 3\), weight \(5, 4\)"):
        compute(torch.zeros(2, 3), Head(torch.zeros(5, 4)), torch.zeros(2, dtype=torch.long), chunk_tokens=5)


@pytest.mark.slow
def test_top_by_ligers_kernel_in_tritons_interpreter():
    """To be chosen before triton is imported, hence a process of its own; it cannot take a softcap (gpu test)."""
    pytest.importorskip("liger_kernel")
    program = """
        import torch
        from lite.loss.head import Head, token_logps, top_logps
        for scale in (1.0, 0.5):
            torch.manual_seed(0)
            hidden, head, labels = torch.randn(5, 8), Head(torch.randn(50, 8), scale=scale), torch.randint(50, (5,))
            plain, liger = (
                top_logps(hidden, head, labels, 7, chunk_tokens=2, kernel=kernel) for kernel in ("plain", "liger")
            )
            assert torch.equal(liger.logps, token_logps(hidden, head, labels, chunk_tokens=2, kernel="liger"))
            assert torch.equal(liger.ids, plain.ids)
            assert torch.allclose(liger.top, plain.top, rtol=1e-6, atol=1e-6), (liger.top - plain.top).abs().max()
        print("equal")
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    outcome = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment, check=False
    )
    assert outcome.stdout.strip() == "equal", outcome.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.125, None), (1.0, 30.0)])
def test_top_and_purity_on_cuda(scale: float, softcap: float | None):
    """bf16, a vocabulary of 151,936: by both kernels, to fp32 rounding of the softmax, as on whole fp32 logits."""
    torch.manual_seed(0)
    draw = {"device": "cuda", "dtype": torch.bfloat16}
    hidden, weight = torch.randn(300, 256, **draw), torch.randn(151_936, 256, **draw) * 0.1
    head, labels = Head(weight, None, scale, softcap), torch.randint(151_936, (300,), device="cuda")
    exact = whole_log_softmax(hidden.double(), Head(weight.double(), None, scale, softcap))
    for kernel in ("plain", "liger"):
        if kernel == "liger":
            pytest.importorskip("liger_kernel")
        logps, top, ids = top_logps(hidden, head, labels, 64, chunk_tokens=128, kernel=kernel)
        with torch.no_grad():
            assert torch.equal(logps, token_logps(hidden, head, labels, chunk_tokens=128, kernel=kernel))
        assert torch.allclose(top.double(), exact.gather(1, ids), rtol=0, atol=2e-5)
        assert torch.allclose(top.double(), exact.topk(64).values, rtol=0, atol=2e-5)
    purity = logps_and_purity(hidden, head, labels, chunk_tokens=128).purity
    assert torch.allclose(purity.double(), (2 * exact).logsumexp(1), rtol=0, atol=1e-4)
