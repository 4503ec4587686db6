"""Soft targets: instead of one label a token, K words with known weights and one weight for all other words together.

So a student learns from a teacher of whom only the K likeliest words of each position were kept. The weights sum to 1,
and q, the student's distribution, is compared on K + 1 events: the K words, and "any other word", whose mass q_rest
the student may spread as it likes. Without that event the teacher's missing mass would be a bias.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lite.loss import chunks, softmax
from lite.loss.head import Head


@dataclass(frozen=True)
class SoftTargets:
    """At each of N tokens the weights of K different words, and the weight of all others together; constants."""

    ids: Tensor  # (N, K) int64, in a row all different
    weights: Tensor  # (N, K) float32
    rest: Tensor  # (N,) float32

    @classmethod
    def of(cls, top_logps: Tensor, ids: Tensor) -> "SoftTargets":
        """From a distribution's top: weights = exp(top_logps), rest = 1 − Σ, not less than 0. Both (N, K)."""
        weights, rest = _masses(top_logps)
        return cls(ids, weights, rest)

    def each(self, made: Callable[[Tensor], Tensor]) -> "SoftTargets":
        """The targets with `made(tensor)` in the place of each of their tensors, such as a copy elsewhere."""
        return SoftTargets(made(self.ids), made(self.weights), made(self.rest))

    def __getitem__(self, tokens: slice | Tensor) -> "SoftTargets":
        """The targets of some tokens."""
        return SoftTargets(self.ids[tokens], self.weights[tokens], self.rest[tokens])


def soft_logps(hidden: Tensor, head: Head, targets: SoftTargets, *, chunk_tokens: int) -> Tensor:
    """Expected log-probability of the targets' events under q = softmax(logits(hidden)), at each token, in nats.

        value = Σ_k w_k · log q(id_k) + w_rest · log q_rest,    q_rest = Σ_v q(v) over the words that are no id

    With W = Σ_k w_k + w_rest (1 for a distribution) the slope is, for an id, d value / d z = w_k − W q(id_k), and for
    any other word r(v) · (w_rest − W q_rest), r(v) = q(v) / q_rest its share of the rest. q_rest and r come from the
    other words' own logits and maximum, never from 1 − Σ q(id_k), so that they are exact and finite however small
    q_rest is. If the ids are the whole vocabulary there is no rest, and w_rest, rounding at most, counts for nothing.

    Where the weights are a distribution p's top, `expected_of` − value is the KL divergence of q from p on the K + 1
    events: at most that of the whole vocabulary, and equal to it if p and q share the rest out alike.

    hidden (N, D) in the weight's dtype or cast to it; memory and gradients as `token_logps`, and N · K targets.
    Returns (N,) float32, or float64 if hidden is. Raises ValueError on a shape mismatch.
    Source: distillation by the teacher's probabilities: Hinton et al. 2015, arXiv:1503.02531 (here at temperature 1).
    That the top K alone are a biased teacher: Anshumann et al. 2025, arXiv:2503.16870. The K words plus one event for
    the mass of the tail: "Tail-Aware Top-k On-Policy Distillation" 2026, arXiv:2608.14728, for the reverse KL.
    """
    _check(hidden, head, targets)

    def measure(logits: Tensor, tokens: slice, slope: bool) -> tuple[Tensor]:
        return (softmax.soft_logps_in_place(logits, targets[tokens], head, slope=slope),)

    return chunks.measured(hidden, head, measure, chunk_tokens=chunk_tokens)[0]


def expected_of(top_logps: Tensor) -> Tensor:
    """What `soft_logps` gives where q is the targets' own distribution p: the negative entropy of the K + 1 events.

        Σ_k p_k log p_k + p_rest log p_rest,    p_rest = 1 − Σ_k p_k, 0 log 0 = 0

    top_logps (N, K): log p of K words. Returns (N,), nats: 0 for certainty, at least −log(K + 1).
    """
    weights, rest = _masses(top_logps)
    return torch.where(weights == 0, 0, weights * top_logps).sum(1) - torch.special.entr(rest)


def _masses(top_logps: Tensor) -> tuple[Tensor, Tensor]:
    weights = top_logps.exp()
    return weights, (1 - weights.sum(1)).clamp(min=0)  # the sum of K rounded numbers may exceed 1


def _check(hidden: Tensor, head: Head, targets: SoftTargets) -> None:
    ids, weights, rest = (tuple(t.shape) for t in (targets.ids, targets.weights, targets.rest))
    fit = hidden.ndim == 2 and hidden.shape[1] == head.weight.shape[1] and rest == hidden.shape[:1]
    if not fit or len(ids) != 2 or ids[0] != len(hidden) or weights != ids:
        raise ValueError(
            f"soft_logps: hidden {tuple(hidden.shape)}, weight {tuple(head.weight.shape)}, ids {ids}, weights "
            f"{weights}, rest {rest}; expected (N, D), (V, D), (N, K), (N, K), (N,)"
        )
