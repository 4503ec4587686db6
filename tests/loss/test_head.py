"""token_logps against plain whole logits: values, gradients, every kind of head, any chunk; and its error budget."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lite.loss.head import Head, LowRank, token_logps

N, D, V, R = 13, 8, 37, 3
KINDS = {
    "frozen": {"trained": False, "low_rank": False},
    "trained": {"trained": True, "low_rank": False},
    "low-rank": {"trained": False, "low_rank": True},
    "low-rank on a trained weight": {"trained": True, "low_rank": True},
}


def plain_logps(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    logits = hidden @ head.weight.t()
    if head.low_rank:
        logits = logits + head.low_rank.scaling * ((hidden @ head.low_rank.a.t()) @ head.low_rank.b.t())
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]


def make(kind: str, *, dtype: torch.dtype = torch.float64, scale: float = 1.0, softcap: float | None = None):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, grad: bool) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    trained, low_rank = KINDS[kind]["trained"], KINDS[kind]["low_rank"]
    hidden, weight, bias = normal(N, D, grad=True), normal(V, D, grad=trained), normal(V, grad=trained)
    adapter = LowRank(normal(R, D, grad=True), normal(V, R, grad=True), 0.7) if low_rank else None
    labels = torch.randint(V, (N,), generator=generator)
    return hidden, Head(weight, bias, scale, softcap, adapter), labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.125, None), (1.0, 5.0), (1.5, 3.0)])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_equals_plain_whole_logits_in_fp64(kind: str, scale: float, softcap: float | None, chunk_tokens: int):
    hidden, head, labels = make(kind, scale=scale, softcap=softcap)
    wanted = [p for p in (hidden, *head.parameters) if p is not None and p.requires_grad]
    coefficients = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, ours = plain_logps(hidden, head, labels), token_logps(hidden, head, labels, chunk_tokens=chunk_tokens)
    assert torch.allclose(ours, plain, rtol=1e-12, atol=1e-12)
    expected, found = (torch.autograd.grad(logps, wanted, coefficients) for logps in (plain, ours))
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_errs_no_more_than_the_naive_bf16_path(kind: str):
    """RMS error against fp32 of values and of each gradient: at most 1.1 times naive's, over 20 draws."""
    trained, low_rank = KINDS[kind]["trained"], KINDS[kind]["low_rank"]

    def outcome(dtype: torch.dtype, draw: list[Tensor], labels: Tensor, compute: Callable) -> list[Tensor]:
        h, w, a, b = (t.to(dtype) for t in draw)
        adapter = LowRank(a.requires_grad_(), b.requires_grad_(), 0.5) if low_rank else None
        head = Head(w.requires_grad_(trained), low_rank=adapter)
        logps = compute(h.requires_grad_(), head, labels)
        wanted = [p for p in (h, *head.parameters) if p is not None and p.requires_grad]
        # 1 / 37 is no bf16 number, and one completion's tokens share it: rounded, it would move them all alike.
        return [t.detach().float() for t in (logps, *torch.autograd.grad(logps.sum() / 37, wanted))]

    squares: dict[int, list[list[float]]] = {}
    for seed in range(20):
        torch.manual_seed(seed)
        draw = [torch.randn(32, 64), torch.randn(501, 64) * 0.3, torch.randn(4, 64) * 0.2, torch.randn(501, 4) * 0.2]
        draw = [t.bfloat16().float() for t in draw]  # fp32 computes with the very weights that bf16 has
        labels = torch.randint(501, (32,))
        exact = outcome(torch.float32, [t.clone() for t in draw], labels, plain_logps)
        naive = outcome(torch.bfloat16, draw, labels, plain_logps)
        ours = outcome(torch.bfloat16, draw, labels, partial(token_logps, chunk_tokens=10))
        for i, (e, n, o) in enumerate(zip(exact, naive, ours, strict=True)):
            squares.setdefault(i, []).append([float((t - e).square().mean()) for t in (n, o)])
    for i, pairs in squares.items():
        naive_error, our_error = torch.tensor(pairs).mean(0).sqrt().tolist()
        assert our_error <= 1.1 * naive_error, (
            f"{'value' if i == 0 else f'gradient {i}'}: {our_error} against {naive_error}"
        )


def test_without_gradient_nothing_is_kept():
    hidden, head, labels = make("frozen")
    with torch.no_grad():
        logps = token_logps(hidden, head, labels, chunk_tokens=5)
    assert not logps.requires_grad
    assert torch.allclose(logps, plain_logps(hidden, head, labels).detach())


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
    """Live bytes inside forward, counted by torch's profiler: a chunk of fp32 logits, its copies, and (N, D) rows."""
    tokens, width, words, chunk = 512, 64, 4096, 32
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(words, width)
    labels = torch.randint(words, (tokens,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        token_logps(hidden, Head(weight), labels, chunk_tokens=chunk)
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
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
        wanted = [p for p in (h, *head.parameters) if p is not None and p.requires_grad]
        outcomes.append([logps.detach(), *torch.autograd.grad(logps.sum(), wanted)])
    for plain, liger in zip(*outcomes, strict=True):
        assert float((plain - liger).float().norm() / plain.float().norm()) < 2e-3  # half a bf16 step
    assert torch.allclose(outcomes[0][0], outcomes[1][0], rtol=1e-5, atol=1e-5)
