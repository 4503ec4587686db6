"""Cost: the operations of a step, the bytes that it moves and the seconds that a card would take for them.

Every operator takes the longer of two times, that of its products at the card's rate and that of its bytes at the
memory's; and the host takes its time to start each of them. Attention is counted by what its branches see, since on
meta nobody knows where they begin. Copies to and from host memory run beside all this.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lite.attention.branches import segments
from lite.data.packs import Pack
from lite.plan.cards import Card

# Products, by the place of their left factor among the arguments; the right one follows it.
PRODUCTS = {f"aten::{name}": 0 for name in ("mm", "bmm", "linear", "_grouped_mm", "matmul")}
PRODUCTS |= {f"aten::{name}": 1 for name in ("addmm", "addmm_", "baddbmm", "baddbmm_")}
ATTENTION = ("_varlen_attn", "_flash_attention", "_scaled_dot_product")
FREE = frozenset(f"aten::{name}" for name in ("empty", "empty_like", "new_empty", "empty_strided", "detach", "alias"))


def visible_pairs(pack: Pack) -> int:
    """How many (query, key) pairs attention computes in a pack: each token sees its branch so far and its ancestors."""
    if pack.attention_mask is not None:
        rows, width = pack.ids.shape
        return rows * width * (width + 1) // 2
    total = 0
    for segment in segments(pack.branches):
        queries = segment.end - segment.start
        total += queries * segment.keys - queries * (queries - 1) // 2
    return total


@dataclass
class Cost:
    """Adds up as operators are seen."""

    card: Card
    pairs: int  # of queries and keys, as `visible_pairs`
    operations: float = 0.0
    moved_bytes: float = 0.0
    seconds: Counter[str] = field(default_factory=Counter)  # of computing, by phase
    started: Counter[str] = field(default_factory=Counter)  # operators, by phase
    transferred: Counter[str] = field(default_factory=Counter)  # bytes to and from host memory, by phase

    def see(self, phase: str, name: str, args: tuple[Any, ...], out: Any, *, tensors: list[Tensor], host: bool) -> None:
        """Count an operator: `tensors` are all that it takes and gives; `host`: whether one lies in host memory."""
        base = name.split(".")[0]
        if base in FREE or not tensors:
            return
        if host:
            self.transferred[phase] += min(_span_bytes(t) for t in tensors)
            return
        operations = self._operations(base, args)
        # A view costs nothing: what comes out is what went in.
        if not operations and not base.endswith("_") and isinstance(out, Tensor) and _is_view(out, tensors[:-1]):
            return
        moved = sum(_span_bytes(t) for t in tensors)
        self.operations += operations
        self.moved_bytes += moved
        rate = self.card.operations * self.card.efficiency
        self.seconds[phase] += max(operations / rate, moved / self.card.bandwidth)
        self.started[phase] += 1

    def step_seconds(self) -> float:
        """Of the whole step."""
        return sum(together(self.times(phase), self.card.overlaps) for phase in self.phases)

    @property
    def phases(self) -> set[str]:
        """Those in which anything was counted."""
        return {*self.seconds, *self.transferred}

    def times(self, phase: str) -> tuple[float, float, float]:
        """Seconds of a phase: of computing, of starting the operators, of transfers."""
        started, transferred = self.started[phase] * self.card.launch_s, self.transferred[phase] / self.card.pcie
        return self.seconds[phase], started, transferred

    def _operations(self, base: str, args: tuple[Any, ...]) -> float:
        if base in PRODUCTS:
            left, right = args[PRODUCTS[base] : PRODUCTS[base] + 2]
            wide = right.shape[0] if base == "aten::linear" else right.shape[-1]
            return 2.0 * left.numel() * wide
        if any(word in base for word in ATTENTION):
            products = 5 if "backward" in base else 2
            return products * 2.0 * self._of_attention(base, args)
        return 0.0

    def _of_attention(self, base: str, args: tuple[Any, ...]) -> float:
        """(query, key) pairs times the width of all heads."""
        if "_scaled_dot_product" not in base:  # one call for all branches
            return float(self.pairs) * args[0].numel() / args[0].shape[0]
        query, key = args[0], args[2 if "backward" in base else 1]  # of a backward, the gradient is first
        tokens, keys = query.shape[-2], key.shape[-2]
        seen = tokens * keys if tokens != keys else tokens * (tokens + 1) // 2
        return float(seen) * query.numel() / tokens


def together(times: Sequence[float], overlaps: bool) -> float:
    """Computing, starting and transfers of a phase: on a GPU side by side, on a CPU one after the other."""
    return max(times) if overlaps else sum(times)


def _is_view(out: Tensor, others: list[Tensor]) -> bool:
    key = out.untyped_storage()._cdata
    return any(t.untyped_storage()._cdata == key for t in others)


def _span_bytes(tensor: Tensor) -> int:
    """Bytes that are really there: an expanded dimension is read once."""
    return (
        math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * tensor.itemsize
    )
