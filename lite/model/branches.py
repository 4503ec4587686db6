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


@dataclass
class BranchTable:
    """The branches of one pack as the kernels want them, made once for all layers."""

    segments: tuple[Segment, ...]
    implementation: Implementation
    device: torch.device
    masks: dict[tuple[int, int, int, torch.dtype], Tensor] = field(default_factory=dict)
    _varlen: tuple[Tensor, Tensor, Tensor | None, int, int] | None = None

    @classmethod
    def of(cls, branches: Sequence[Branch], implementation: Implementation, device: torch.device) -> "BranchTable":
        """The table of a pack's branches."""
        return cls(tuple(segments(branches)), implementation, device)

    def varlen(self) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
        """(cumulative queries, cumulative keys, tokens to gather as keys or None for all in order, longest of each)."""
        if self._varlen is None:
            queries = torch.tensor([0, *(s.end - s.start for s in self.segments)]).cumsum(0)
            keys = torch.tensor([0, *(s.keys for s in self.segments)]).cumsum(0)
            spans = [span for s in self.segments for span in s.spans]
            gather = torch.cat([torch.arange(*span) for span in spans])
            if torch.equal(queries, keys):
                gather = None
            longest = int(queries.diff().max()), int(keys.diff().max())
            to = {"device": self.device, "non_blocking": True}
            cumulative = queries.to(torch.int32).to(**to), keys.to(torch.int32).to(**to)
            self._varlen = *cumulative, None if gather is None else gather.to(**to), *longest
        return self._varlen

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
