"""Logps: the waist. Everything left of it ends in this record, every loss starts from it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Logps:
    """Natural-log probability of each scored token of B completions, one after the other.

    tokens (N,) float32 (float64 in tests), nats; offsets (B+1,) int64: completion b is tokens[offsets[b]:offsets[b+1]].
    """

    tokens: Tensor  # (N,)
    offsets: Tensor  # (B+1,)

    @property
    def total(self) -> Tensor:
        """log p(completion | prompt) = Σ over its tokens, (B,)."""
        return torch.segment_reduce(self.tokens, "sum", offsets=self.offsets)

    @property
    def length(self) -> Tensor:
        """Scored tokens of each completion, (B,) int64."""
        return self.offsets.diff()

    @property
    def mean(self) -> Tensor:
        """Log-probability per token, (B,)."""
        return self.total / self.length

    @classmethod
    def from_totals(cls, total: Tensor, length: Tensor) -> "Logps":
        """Completions whose tokens are equally likely: for derivations by hand. total (B,), length (B,) int64."""
        offsets = torch.cat([length.new_zeros(1), length.cumsum(0)])
        return cls((total / length).repeat_interleave(length), offsets)
