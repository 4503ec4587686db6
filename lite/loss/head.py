"""The language-model head, and log-probabilities through it: of labels, with the policy's purity, or with the top k.

What is the same for all of these, going through the logits a chunk at a time and back, is `chunks`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lite.loss import chunks, softmax


class LowRank(NamedTuple):
    """A LoRA on the head: W + scaling · B A."""

    a: Tensor  # (R, D)
    b: Tensor  # (V, R)
    scaling: float


@dataclass(frozen=True)
class Head:
    """logits = softcap · tanh(scale · (h Wᵀ + bias) / softcap); without softcap, scale · (h Wᵀ + bias)."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0  # Granite divides its logits, Cohere multiplies them
    softcap: float | None = None  # Gemma 2: 30
    low_rank: LowRank | None = None
    # Of a trained weight: who takes its gradient leftᵀ right, in factors left (C, V) and right (C, D); None: autograd.
    take: Callable[[Tensor, Tensor], None] | None = None

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """weight, bias, A, B: what a gradient may be asked for."""
        return (self.weight, self.bias, *(self.low_rank[:2] if self.low_rank else (None, None)))


def token_logps(
    hidden: Tensor, head: Head, labels: Tensor, *, chunk_tokens: int, kernel: softmax.Kernel = "auto"
) -> Tensor:
    """Log-probability of each label under softmax(logits(hidden)), in nats.

    Equals `log_softmax(logits.float(), -1).gather(-1, labels[:, None])[:, 0]`, logits as in `Head`.
    Extra memory: chunk_tokens · V logits, and one (N, D) store of rows if the head is frozen and hidden needs grad.

    hidden (N, D) in the weight's dtype or cast to it; labels (N,) int64 in [0, V).
    Returns (N,) float32, or float64 if hidden is. Raises ValueError on a shape mismatch.
    Source: chunked linear cross-entropy of Wijmans et al. 2024, arXiv:2411.09009; gradient rows in forward are ours.
    """
    _check("token_logps", hidden, head, labels)
    kernel = softmax.choose(kernel, hidden.device)

    def measure(logits: Tensor, tokens: slice, slope: bool) -> tuple[Tensor]:
        return (softmax.logps_in_place(logits, labels[tokens], head, slope=slope, kernel=kernel),)

    return chunks.measured(hidden, head, measure, chunk_tokens=chunk_tokens)[0]


class LogpsAndPurity(NamedTuple):
    """Two numbers of each scored token, nats."""

    logps: Tensor  # (N,): log q(label)
    purity: Tensor  # (N,): log Σ_v q(v)², detached


def logps_and_purity(hidden: Tensor, head: Head, labels: Tensor, *, chunk_tokens: int) -> LogpsAndPurity:
    """`token_logps`, and with it log Σ_v q(v)², the log-probability that two draws from q are the same word.

    The mean of q(label) over labels drawn from q is Σ_v q(v)²: by it WPO compares a label with what the policy would
    have said itself. One pass more over each chunk, no copy of it; the logps and their gradient are, bit for bit,
    those of `token_logps` with the plain kernel, which this always uses: Liger's leaves no probabilities behind.

    hidden (N, D), labels (N,) int64. purity lies in [−log V, 0]. Raises ValueError on a shape mismatch.
    Source: the sampled alignment of weights in Zhou et al. 2024 (WPO), arXiv:2406.11827.
    """
    _check("logps_and_purity", hidden, head, labels)

    def measure(logits: Tensor, tokens: slice, slope: bool) -> tuple[Tensor, Tensor]:
        return softmax.logps_and_purity_in_place(logits, labels[tokens], head, slope=slope)

    return LogpsAndPurity(*chunks.measured(hidden, head, measure, chunk_tokens=chunk_tokens))


class TopLogps(NamedTuple):
    """What `top_logps` finds at each token."""

    logps: Tensor  # (N,): of the label, nats
    top: Tensor  # (N, K): the K greatest of the vocabulary, in descending order, nats
    ids: Tensor  # (N, K) int64: their words


@torch.no_grad()
def top_logps(
    hidden: Tensor, head: Head, labels: Tensor, k: int, *, chunk_tokens: int, kernel: softmax.Kernel = "auto"
) -> TopLogps:
    """The log-probability of each label and the k greatest of the vocabulary, from one product; no gradient.

    logps equals `token_logps` without gradient bit for bit; top and ids equal `log_softmax(logits.float(), -1).topk(k)`
    (which of two equal words comes first is not said). Extra memory: chunk_tokens · V logits, N · k results.

    hidden (N, D); labels (N,) int64; 1 ≤ k ≤ V. Returns float32, or float64 if hidden is. Raises ValueError on a shape
    mismatch or on another k.
    """
    _check("top_logps", hidden, head, labels)
    if not 1 <= k <= len(head.weight):
        raise ValueError(f"top_logps: k = {k}; expected 1 … {len(head.weight)}, the head's vocabulary")
    kernel = softmax.choose(kernel, hidden.device)

    def measure(logits: Tensor, tokens: slice, slope: bool) -> tuple[Tensor, Tensor, Tensor]:
        return softmax.top_logps_in_place(logits, labels[tokens], k, head, kernel=kernel)

    return TopLogps(*chunks.measured(hidden, head, measure, chunk_tokens=chunk_tokens))


def _check(name: str, hidden: Tensor, head: Head, labels: Tensor) -> None:
    """ValueError, in the name of the function that was called, unless hidden (N, D), weight (V, D), labels (N,) fit."""
    if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"{name}: hidden {tuple(hidden.shape)}, weight {tuple(head.weight.shape)}, labels "
            f"{tuple(labels.shape)}; expected (N, D), (V, D), (N,)"
        )
