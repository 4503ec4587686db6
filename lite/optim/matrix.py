"""A trained matrix: its weight as it is stored, what arises of its gradient, and how an update gets into it.

Of W (out, in) the gradient is G = leftᵀ right, left (T, out) what comes back and right (T, in) what went in. Here it is
always seen with its shorter side first: G is (m, n), m ≤ n, the transpose of W's if out ≥ in, and G = shortᵀ long. What
is wanted of it, PᵀG for the optimizer and GΩ for the next subspace, is made of the factors, pack by pack, and adds up:

    PᵀG = (short P)ᵀ long     2·T·r·(m + n) operations instead of 2·T·m·n + 2·r·m·n, and no (m, n) gradient
    GΩ  = shortᵀ (long Ω)
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from lite.device import kind
from lite.kernels import operators, updates
from lite.loss.chunks import precise
from lite.optim import blocks
from lite.optim.draws import key
from lite.optim.rounding import to_bfloat16

CHUNK = 4 * 2**20  # weights that are updated at once: they stay in a CPU's cache
CHUNK_ON_CUDA = 8 * 2**20  # each chunk is some twenty kernels to start, and takes 20 bytes a weight meanwhile
CHUNK_IN_ONE_PASS = 32 * 2**20  # two kernels to start, 4 bytes a weight
Gathers = Literal["sketch", "whole"]


class Matrix:
    """W (out, in) in fp64, fp32, bf16 or eight bits; `weight` is the layer's own parameter, changed in place."""

    def __init__(self, weight: nn.Parameter, scale: Tensor | None = None, *, waits: bool = True) -> None:
        """scale: of 8-bit codes (blocks.py), the layer's own buffer. waits: whether updates may wait beside the weight.

        They may where everything that computes with it asks `product` and `back`: the head's and embedding's do not.
        """
        self.weight, self.scale, self.waits = weight, scale, waits
        if scale is not None:
            blocks.grid(weight.device)  # so that no step is the first to need it
        out, width = weight.shape
        self.transposed = out >= width  # whether G is the transpose of W's; of square ones as galore-torch has it
        self.short, self.long = min(out, width), max(out, width)
        # Stands for the weight in a graph, for codes cannot ask for a gradient.
        self.anchor = weight if scale is None else torch.empty(0, device=weight.device, requires_grad=True)
        self.basis: Tensor | None = None  # P (m, r); None: the whole gradient is kept
        # Where updates wait, W is kept · (what is stored) + P A.
        self.pending: Tensor | None = None  # A (r, n)
        self.kept = 1.0
        self.gradient: Tensor | None = None  # PᵀG (r, n) so far
        self.gathered: Tensor | None = None  # GΩ (m, s), or G itself, so far
        self._gathers: Gathers | None = None
        self._draw: Callable[[], Tensor] | None = None
        self._directions: Tensor | None = None  # Ω (n, s), from the first pack to the end of the step

    @property
    def canonical_shape(self) -> tuple[int, int]:
        """(m, n): the shorter side first."""
        return self.short, self.long

    @property
    def exact(self) -> torch.dtype:
        """In which sums are kept and updates computed: fp32, of fp64 weights fp64."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def product(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias, (T, out) in x's dtype, in `out` if that is given; x (T, in)."""
        weight = self._stored(x.dtype).t()
        if bias is None:
            result = torch.mm(x, weight, out=out)
        else:
            result = torch.addmm(bias.to(x.dtype), x, weight, alpha=self.kept, out=out)
        del weight  # of dequantised ones, before anything else is made
        if self.pending is not None:
            left, right = self._waiting(x.dtype)
            result.addmm_(x @ right.t(), left.t(), beta=self.kept if bias is None else 1.0)
        return result

    def back(self, grad: Tensor) -> Tensor:
        """grad W, (T, in) in grad's dtype; grad (T, out)."""
        result = torch.mm(grad, self._stored(grad.dtype))
        if self.pending is not None:
            left, right = self._waiting(grad.dtype)
            result.addmm_(grad @ left, right, beta=self.kept)
        return result

    def gather(self, what: Gathers, draw: Callable[[], Tensor] | None = None) -> None:
        """From the next pack on gather this too: a sketch in the directions Ω (n, s) that `draw` gives, or all of G."""
        self._gathers, self._draw, self._directions = what, draw, None

    def forget(self) -> None:
        """Let go of the gradient, and of what a step gathered beside it."""
        self.gradient = self.gathered = self._directions = self._draw = self._gathers = None

    @torch.no_grad()
    def take(self, left: Tensor, right: Tensor) -> None:
        """Add the gradient leftᵀ right of a pack, or of a part of one: left (T, out), right (T, in), in one dtype."""
        short, long = (right, left) if self.transposed else (left, right)
        self.gradient = _added(self.gradient, self._projected(short), long, self.exact)
        if self._gathers == "sketch":
            self.gathered = _added(self.gathered, short, long @ self._omega(long.dtype), self.exact)
        elif self._gathers == "whole":
            self.gathered = _added(self.gathered, short, long, self.exact)

    @torch.no_grad()
    def take_rows(self, ids: Tensor, right: Tensor) -> None:
        """The same where left is one-hot, of an embedding: row ids[t] of W went out; ids (T,), right (T, in)."""
        if not self.transposed:  # fewer words than dimensions
            self.take(nn.functional.one_hot(ids, len(self.weight)).to(right.dtype), right)
            return
        projected = self._projected(right).to(self.exact)
        if self.gradient is None:
            self.gradient = projected.new_zeros(projected.shape[1], self.long)
        self.gradient.index_add_(1, ids, projected.t())
        if self._gathers == "sketch":
            self.gathered = _added(self.gathered, right, self._omega(right.dtype)[ids], self.exact)
        elif self._gathers == "whole":
            if self.gathered is None:
                self.gathered = right.new_zeros(self.canonical_shape, dtype=self.exact)
            self.gathered.index_add_(1, ids, right.t().to(self.exact))

    @torch.no_grad()
    def update(self, change: Tensor, decay: float, generator: torch.Generator | None) -> None:
        """W ← decay · W + P change, rounded as it is stored; change (r, n) in `exact`.

        A few rows of W at a time, so that no second matrix of its size ever exists.
        """
        if (self.scale is not None or self.weight.dtype == torch.bfloat16) and operators.at_hand(change):
            self._update_in_one_pass(change, decay, generator)
            return
        for start, stop in self._row_blocks(CHUNK_ON_CUDA if kind(self.weight) == "cuda" else CHUNK):
            left, right = self._factors(change, start, stop)
            rows = self.weight[start:stop]
            if self.scale is None and rows.dtype == self.exact:
                if left is None:
                    rows.mul_(decay).add_(right)
                else:
                    rows.addmm_(left, right, beta=decay)
                continue
            exact = self._stored_rows(start, stop)
            exact = exact.mul_(decay).add_(right) if left is None else exact.addmm_(left, right, beta=decay)
            if self.scale is None:
                rows.copy_(to_bfloat16(exact, generator))
            else:
                blocks.rounded_into_(rows, self.scale[self._blocks(start, stop)], exact, generator)

    def _update_in_one_pass(self, change: Tensor, decay: float, generator: torch.Generator | None) -> None:
        seed, first = key(generator)
        width = self.weight.shape[1]
        for start, stop in self._row_blocks(CHUNK_IN_ONE_PASS):
            left, right = self._factors(change, start, stop)
            addend = right.contiguous() if left is None else left @ right  # (rows, in)
            drawn = {"seed": seed, "first": first + start * width // 4}
            rows = self.weight[start:stop]
            if self.scale is None:
                updates.add_rounded_(rows, addend, decay, **drawn)
            else:
                updates.add_blocks_(rows, self.scale[self._blocks(start, stop)], addend, decay, **drawn)
            del addend  # before the next is made

    @torch.no_grad()
    def wait(self, change: Tensor, decay: float) -> None:
        """`update`, but nothing is rounded: the change waits beside the weight, which computes as if it were in it."""
        if self.pending is None:
            self.pending = torch.zeros_like(change)
        self.pending.mul_(decay).add_(change)
        self.kept *= decay

    def merge(self, generator: torch.Generator | None) -> None:
        """Round what waits into the weight; before the basis changes."""
        if self.pending is not None:
            change, self.pending = self.pending, None
            decay, self.kept = self.kept, 1.0
            self.update(change, decay, generator)

    @torch.no_grad()
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of W, (stop − start, in), in fp32 (of fp64 weights fp64), with what waits."""
        exact = self._stored_rows(start, stop)
        if self.pending is not None:
            left, right = self._factors(self.pending, start, stop)
            exact.addmm_(left, right, beta=self.kept)
        return exact

    def _omega(self, dtype: torch.dtype) -> Tensor:
        if self._directions is None:
            assert self._draw is not None
            self._directions = self._draw().to(dtype)
        return self._directions.to(dtype)

    def _projected(self, short: Tensor) -> Tensor:
        return short if self.basis is None else short @ self.basis.to(short.dtype)

    def _stored(self, dtype: torch.dtype) -> Tensor:
        """The stored weight in `dtype`: itself, or a copy for one product."""
        if self.scale is None:
            return self.weight.detach().to(dtype)
        return blocks.dequantised(self.weight, self.scale, dtype)

    def _stored_rows(self, start: int, stop: int) -> Tensor:
        """A copy in `exact`; start and stop of 8-bit rows may lie within blocks."""
        rows = self.weight[start:stop]
        if self.scale is None:
            return rows.detach().to(self.exact, copy=True)
        width = self.weight.shape[1]
        first = start * width // blocks.BLOCK * blocks.BLOCK
        codes = self.weight.view(-1)[first : stop * width]
        exact = blocks.dequantised(codes, self.scale[first // blocks.BLOCK :], self.exact)
        return exact[start * width - first :].view(rows.shape)

    def _factors(self, change: Tensor, start: int, stop: int) -> tuple[Tensor | None, Tensor]:
        """Of rows [start, stop) of W's change: left (rows, r) and right (r, in), or None and the rows themselves."""
        if self.basis is None:
            return None, change[:, start:stop].t() if self.transposed else change[start:stop]
        basis = self.basis.to(change.dtype)
        return (change[:, start:stop].t(), basis.t()) if self.transposed else (basis[start:stop], change)

    def _waiting(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """P A as factors of W: left (out, r), right (r, in)."""
        assert self.pending is not None
        left, right = self._factors(self.pending, 0, len(self.weight))
        assert left is not None, "without a basis nothing waits"
        return left.to(dtype), right.to(dtype)

    def _row_blocks(self, most: int) -> Iterator[tuple[int, int]]:
        out, width = self.weight.shape
        whole = blocks.BLOCK // math.gcd(blocks.BLOCK, width)  # rows that are whole blocks of 8 bits
        step = max(1, most // width // whole) * whole
        return ((start, min(start + step, out)) for start in range(0, out, step))

    def _blocks(self, start: int, stop: int) -> slice:
        width = self.weight.shape[1]
        return slice(start * width // blocks.BLOCK, -(-stop * width // blocks.BLOCK))


def _added(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + leftᵀ right in `dtype`, in place where there is a total."""
    if left.dtype == right.dtype == dtype:
        return left.t() @ right if total is None else total.addmm_(left.t(), right)
    product = precise(left.t(), right)
    return product if total is None else total.add_(product)
