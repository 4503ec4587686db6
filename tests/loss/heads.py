"""Heads of every kind on random numbers, their plain whole logits, and the error budget of bf16."""

from collections.abc import Callable

import torch
from torch import Tensor

from lite.loss.head import Head, LowRank

N, D, V, R = 13, 8, 37, 3
KINDS = {
    "frozen": {"trained": False, "low_rank": False},
    "trained": {"trained": True, "low_rank": False},
    "low-rank": {"trained": False, "low_rank": True},
    "low-rank on a trained weight": {"trained": True, "low_rank": True},
}
BENDS = [(1.0, None), (0.125, None), (1.0, 5.0), (1.5, 3.0)]  # scale, softcap


def make(kind: str, *, dtype: torch.dtype = torch.float64, scale: float = 1.0, softcap: float | None = None):
    """Hidden states that want a gradient, a head, and labels."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, grad: bool) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    trained, low_rank = KINDS[kind]["trained"], KINDS[kind]["low_rank"]
    hidden, weight, bias = normal(N, D, grad=True), normal(V, D, grad=trained), normal(V, grad=trained)
    adapter = LowRank(normal(R, D, grad=True), normal(V, R, grad=True), 0.7) if low_rank else None
    labels = torch.randint(V, (N,), generator=generator)
    return hidden, Head(weight, bias, scale, softcap, adapter), labels


def wanted(hidden: Tensor, head: Head) -> list[Tensor]:
    """What a gradient is asked for."""
    return [p for p in (hidden, *head.parameters) if p is not None and p.requires_grad]


def whole_log_softmax(hidden: Tensor, head: Head) -> Tensor:
    """log q of every word, (N, V), by plain torch."""
    logits = hidden @ head.weight.t()
    if head.low_rank:
        logits = logits + head.low_rank.scaling * ((hidden @ head.low_rank.a.t()) @ head.low_rank.b.t())
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def plain_logps(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    return whole_log_softmax(hidden, head).gather(-1, labels[:, None])[:, 0]


def assert_within_naive_bf16(kind: str, data: Callable[[], object], naive: Callable, ours: Callable) -> None:
    """RMS error against fp32 of values and of each gradient: at most 1.1 times naive's, over 20 draws.

    naive and ours take hidden (32, 64), a head of 501 words and what `data` draws, and return (32,).
    """
    trained, low_rank = KINDS[kind]["trained"], KINDS[kind]["low_rank"]

    def outcome(dtype: torch.dtype, draw: list[Tensor], drawn: object, compute: Callable) -> list[Tensor]:
        h, w, a, b = (t.to(dtype) for t in draw)
        adapter = LowRank(a.requires_grad_(), b.requires_grad_(), 0.5) if low_rank else None
        head = Head(w.requires_grad_(trained), low_rank=adapter)
        values = compute(h.requires_grad_(), head, drawn)
        # 1 / 37 is no bf16 number, and one completion's tokens share it: rounded, it would move them all alike.
        gradients = torch.autograd.grad(values.sum() / 37, wanted(h, head))
        return [t.detach().float() for t in (values, *gradients)]

    squares: dict[int, list[list[float]]] = {}
    for seed in range(20):
        torch.manual_seed(seed)
        draw = [torch.randn(32, 64), torch.randn(501, 64) * 0.3, torch.randn(4, 64) * 0.2, torch.randn(501, 4) * 0.2]
        draw = [t.bfloat16().float() for t in draw]  # fp32 computes with the very weights that bf16 has
        drawn = data()
        outcomes = (
            outcome(torch.float32, [t.clone() for t in draw], drawn, naive),
            outcome(torch.bfloat16, draw, drawn, naive),
            outcome(torch.bfloat16, draw, drawn, ours),
        )
        for i, (e, n, o) in enumerate(zip(*outcomes, strict=True)):
            squares.setdefault(i, []).append([float((t - e).square().mean()) for t in (n, o)])
    for i, pairs in squares.items():
        naive_error, our_error = torch.tensor(pairs).mean(0).sqrt().tolist()
        assert our_error <= 1.1 * naive_error, (
            f"{'value' if i == 0 else f'gradient {i}'}: {our_error} against {naive_error}"
        )


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that `run` holds at a time beside what lived before, counted by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
