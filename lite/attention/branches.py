"""The branches of a pack as attention kernels want them: runs of queries, the spans that are their keys, and masks.

Along a branch's path from its root the positions are contiguous. So for the queries of a branch its keys are the
ancestors' tokens and its own, gathered, under a causal mask aligned to the last key, and windows and caps keep their
meaning. A branch that starts where its parent ends (prompt, chosen) shares one run of queries with it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lite.data.packs import Branch
from lite.device import sent

Implementation = Literal["auto", "flash", "varlen", "sdpa", "eager"]


class Segment(NamedTuple):
    """A run of queries, and the spans of tokens that are its keys, in the order of their positions."""

    start: int
    end: int
    spans: tuple[tuple[int, int], ...]

    @property
    def keys(self) -> int:
        """How many tokens the spans hold."""
        return sum(end - start for start, end in self.spans)


class Runs(NamedTuple):
    """Segments as variable-length kernels take them: S runs of queries, with K gathered keys in all for T tokens."""

    queries: Tensor  # (S + 1,) int32, cumulative
    keys: Tensor  # (S + 1,) int32, cumulative
    longest_queries: int
    longest_keys: int
    gather: Tensor | None  # (K,) int64: the token of each key; None if they are all tokens in order
    own: Tensor | None = None  # (T,) int64: of each token its key in its own run; the others are copies
    # (tokens, their keys), int64: of the tokens that have one a copy, then of those that have two the second, …
    copies: tuple[tuple[Tensor, Tensor], ...] = ()

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "Runs":
        """The runs of a table's segments, found on the CPU and sent to `device` in two pieces."""
        lengths = torch.tensor([[0, *(s.end - s.start for s in segments)], [0, *(s.keys for s in segments)]])
        longest = lengths.amax(1).tolist()
        ends = lengths.cumsum(1)
        queries, keys = sent(ends.to(torch.int32), device)
        if torch.equal(*lengths):
            return cls(queries, keys, *longest, None)
        gather = torch.cat([torch.arange(*span) for s in segments for span in s.spans])
        # A segment's own run is the last of its spans.
        starts = (ends[1] - lengths[0])[1:].tolist()
        bounds = list(zip(ends[1, :-1].tolist(), starts, ends[1, 1:].tolist(), strict=True))
        copied = torch.cat([torch.arange(first, start) for first, start, _ in bounds])
        own = torch.cat([torch.arange(start, end) for _, start, end in bounds])
        copied = copied[gather[copied].argsort(stable=True)]
        tokens = gather[copied]
        rank = torch.arange(len(tokens)) - torch.searchsorted(tokens, tokens)
        rounds = [part for r in range(int(rank.max()) + 1) for part in (tokens[rank == r], copied[rank == r])]
        pieces = [gather, own, *rounds]
        gather, own, *rounds = sent(torch.cat(pieces), device).split([len(piece) for piece in pieces])
        return cls(queries, keys, *longest, gather, own, tuple(zip(rounds[::2], rounds[1::2], strict=True)))


@dataclass
class BranchTable:
    """The branches of one pack as the kernels want them, made once for all layers."""

    segments: tuple[Segment, ...]
    implementation: Implementation
    device: torch.device
    masks: dict[tuple[int, int, int, torch.dtype], Tensor] = field(default_factory=dict)
    _runs: Runs | None = None

    @classmethod
    def of(cls, branches: Sequence[Branch], implementation: Implementation, device: torch.device) -> "BranchTable":
        """The table of a pack's branches."""
        return cls(tuple(segments(branches)), implementation, device)

    def runs(self) -> Runs:
        """What variable-length kernels are told."""
        if self._runs is None:
            self._runs = Runs.of(self.segments, self.device)
        return self._runs

    def mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(queries, keys), 0 where the last `queries` of `keys` positions see a key and −inf elsewhere."""
        key = (queries, keys, window or 0, dtype)
        if key not in self.masks:
            behind = torch.arange(keys - queries, keys, device=self.device)[:, None] - torch.arange(
                keys, device=self.device
            )
            hidden = (behind < 0) | (behind >= (window or keys))
            self.masks[key] = torch.zeros(queries, keys, dtype=dtype, device=self.device).masked_fill_(
                hidden, float("-inf")
            )
        return self.masks[key]


def segments(branches: Sequence[Branch]) -> Iterator[Segment]:
    """The runs of queries of a forest, in the order of its tokens, which are covered once each."""
    spans: dict[int, tuple[tuple[int, int], ...]] = {-1: ()}
    run: Segment | None = None
    last = -1
    for index, branch in enumerate(branches):
        spans[index] = (*spans[branch.parent], (branch.start, branch.end))
        if run and branch.parent == last and branch.start == run.end:
            first = run.spans[-1][0]
            run = Segment(run.start, branch.end, (*run.spans[:-1], (first, branch.end)))
        else:
            if run:
                yield run
            run = Segment(branch.start, branch.end, spans[index])
        last = index
    if run:
        yield run
