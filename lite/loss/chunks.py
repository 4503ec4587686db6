"""Hidden states through the head to numbers per token, without ever holding the whole logits.

The logits of 2,048 tokens over 152,064 words are 1.2 GB in fp32, and a naive loss holds three such buffers. Here a
chunk of tokens at a time goes through the head, and a `Measure` makes of its logits what is wanted, with the slope in
their place. What backward needs depends on what is trained:

frozen    a token's value depends on its own hidden state alone, so its gradient row, slope · W, is computed in
          forward, while the chunk's logits exist. Backward scales rows: two matrix products in all, not three.
trained   backward computes each chunk again, for the weight's gradient needs the incoming coefficients. It is summed
          here, or given away chunk by chunk, in factors (`Head.take`).
low-rank  frozen weight plus (B A) · scaling, a LoRA on the head; as trained, but only A and B get gradients.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lite.device import kind
from lite.loss import softmax

if TYPE_CHECKING:
    from lite.loss.head import Head, LowRank

# measure(logits (C, V), tokens, slope): what the logits of these C of the N tokens amount to, each output (C, …). The
# first, (C,), is the value that is differentiated; the others are constants. Logits are fp32 or fp64, before the head's
# scale and cap, and may be ruined; if `slope`, they become d −value / d logits.
Measure = Callable[[Tensor, slice, bool], tuple[Tensor, ...]]


def measured(hidden: Tensor, head: "Head", measure: Measure, *, chunk_tokens: int) -> tuple[Tensor, ...]:
    """Each output of `measure` for all tokens, (N, …); the first is differentiable in hidden and the head's parameters.

    Extra memory: chunk_tokens · V logits, and one (N, D) store of rows if the head is frozen and hidden needs grad.
    hidden (N, D), cast to the weight's dtype.
    """
    hidden = hidden.to(head.weight.dtype)
    settings = _Settings(head, measure, chunk_tokens)
    if not torch.is_grad_enabled():  # a Function would be told that hidden needs its rows
        chunks = _Chunks(hidden, settings)
        return _joined([chunks.measured(hidden, chunk, slope=False)[0] for chunk in settings.chunks(len(hidden))])
    if any(p is not None and p.requires_grad for p in head.parameters):
        return _Recomputed.apply(hidden, settings, *head.parameters)
    return _RowsInForward.apply(hidden, settings)


class _Settings(NamedTuple):
    head: "Head"
    measure: Measure
    chunk_tokens: int

    def chunks(self, count: int) -> list[slice]:
        starts = range(0, max(count, 1), self.chunk_tokens)  # of no tokens one chunk, which gives the outputs' shapes
        return [slice(start, start + self.chunk_tokens) for start in starts]


class _RowsInForward(torch.autograd.Function):
    """The frozen head: rows (N, D) of d −value / d hidden are made in forward, backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, settings: _Settings) -> tuple[Tensor, ...]:
        head, needs_rows = settings.head, ctx.needs_input_grad[0]
        rows = torch.empty_like(hidden) if needs_rows else None
        chunks, parts = _Chunks(hidden, settings), []
        for chunk in settings.chunks(len(hidden)):
            outputs, slope = chunks.measured(hidden, chunk, slope=needs_rows)
            parts.append(outputs)
            if slope is not None:
                torch.mm(slope, head.weight, out=rows[chunk])
                if head.low_rank:
                    rows[chunk] += _through_low_rank(slope, head.low_rank, hidden.dtype)
                del slope  # else it lives beside the next chunk's logits
        if needs_rows:
            ctx.save_for_backward(rows)
        return _outputs(ctx, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        # Not rounded to bf16 first: a completion's tokens share their coefficient, so its error would not average out.
        return torch.mul(rows, grad.neg()[:, None], out=torch.empty_like(rows)), None


class _Recomputed(torch.autograd.Function):
    """The trained or low-rank head: forward keeps hidden alone, backward computes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, settings: _Settings, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden, *parameters)
        ctx.settings = settings
        chunks = _Chunks(hidden, settings)
        return _outputs(ctx, [chunks.measured(hidden, c, slope=False)[0] for c in settings.chunks(len(hidden))])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, a, b = ctx.saved_tensors
        head, needs = ctx.settings.head, dict(zip(_INPUTS, ctx.needs_input_grad, strict=True))
        d_hidden = torch.empty_like(hidden) if needs["hidden"] else None
        # Sums over chunks are kept in fp32: hundreds of bf16 additions would lose what the later chunks add.
        sums = {
            name: torch.zeros_like(parameter, dtype=softmax.accumulator(parameter.dtype))
            for name, parameter in zip(_INPUTS[2:], (weight, bias, a, b), strict=True)
            if needs[name] and not (name == "weight" and head.take is not None)
        }
        chunks = _Chunks(hidden, ctx.settings)
        for chunk in ctx.settings.chunks(len(hidden)):
            h = hidden[chunk]
            _, slope = chunks.measured(hidden, chunk, slope=True, coefficients=grad[chunk].neg())
            if needs["hidden"]:
                torch.mm(slope, weight, out=d_hidden[chunk])
                if head.low_rank:
                    d_hidden[chunk] += _through_low_rank(slope, head.low_rank, h.dtype)
            if needs["weight"] and head.take is not None:
                head.take(slope, h)
            elif needs["weight"]:
                sums["weight"] += precise(slope.t(), h)
            if needs["bias"]:
                sums["bias"] += slope.sum(0, dtype=sums["bias"].dtype)
            if needs["b"]:
                sums["b"] += precise(slope.t(), h @ a.to(h.dtype).t()) * head.low_rank.scaling
                sums["a"] += precise((slope @ b.to(h.dtype)).t(), h) * head.low_rank.scaling
            del slope
        dtype = {"weight": weight, "bias": bias, "a": a, "b": b}
        return d_hidden, None, *(sums[n].to(dtype[n].dtype) if n in sums else None for n in _INPUTS[2:])


_INPUTS = ("hidden", "settings", "weight", "bias", "a", "b")  # of _Recomputed.forward


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _outputs(ctx: Any, parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    outputs = _joined(parts)
    ctx.mark_non_differentiable(*outputs[1:])
    return outputs


def precise(left: Tensor, right: Tensor) -> Tensor:
    """left · right, not rounded to bf16."""
    dtype = softmax.accumulator(left.dtype)
    if kind(left) == "cuda" and dtype != left.dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


class _Chunks:
    """One chunk of logits after another: h Wᵀ + bias, their measure, and its slope in the dtype of h.

    On a CPU all chunks use the same buffer, for touching fresh pages takes longer than the softmax; which goes a few
    rows at a time, so that its many passes stay in the cache. On CUDA the allocator and the kernel see to both, and
    the product is not rounded to bf16 on its way to the softmax.
    """

    TILE_BYTES = 2_500_000  # of four rows of 150,000 words in fp32

    def __init__(self, hidden: Tensor, settings: _Settings) -> None:
        self.settings, self.dtype, self.precise = settings, hidden.dtype, softmax.accumulator(hidden.dtype)
        words = len(settings.head.weight)
        self.buffer = self.tile = None
        most = min(settings.chunk_tokens, len(hidden))
        self.rows = max(1, min(most, self.TILE_BYTES // (words * self.precise.itemsize)))
        if kind(hidden) != "cuda":
            self.buffer = hidden.new_empty(most, words)
            if self.dtype != self.precise:
                self.tile = hidden.new_empty(self.rows, words, dtype=self.precise)

    def measured(
        self, hidden: Tensor, chunk: slice, *, slope: bool, coefficients: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The measure of hidden[chunk] and, if asked for, d −value / d product (C, V), rows times `coefficients`."""
        hidden = hidden[chunk]
        product = self._product(hidden)
        size = self.rows if self.buffer is not None else max(len(hidden), 1)
        parts = []
        for start in range(0, max(len(hidden), 1), size):
            rows = slice(start, min(start + size, len(hidden)))
            logits = self._precise_rows(product[rows])
            self._add_terms(logits, hidden[rows])
            tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
            parts.append(self.settings.measure(logits, tokens, slope))
            if coefficients is not None:
                logits.mul_(coefficients[rows, None])
            if slope and logits.dtype != product.dtype:
                product[rows] = logits
        return _joined(parts), product.to(self.dtype) if slope else None

    def _product(self, hidden: Tensor) -> Tensor:
        weight = self.settings.head.weight.t()
        if self.buffer is not None:
            return torch.mm(hidden, weight, out=self.buffer[: len(hidden)])
        if self.dtype != self.precise:
            return torch.mm(hidden, weight, out_dtype=self.precise)
        return torch.mm(hidden, weight)

    def _precise_rows(self, product: Tensor) -> Tensor:
        return product if product.dtype == self.precise else self.tile[: len(product)].copy_(product)

    def _add_terms(self, logits: Tensor, hidden: Tensor) -> None:
        head = self.settings.head
        if head.low_rank:
            a, b, scaling = head.low_rank
            logits += ((hidden @ a.to(self.dtype).t()) @ b.to(self.dtype).t()).to(self.precise).mul_(scaling)
        if head.bias is not None:
            logits += head.bias


def _through_low_rank(slope: Tensor, low_rank: "LowRank", dtype: torch.dtype) -> Tensor:
    """slope · (scaling · B A), (C, D)."""
    return ((slope @ low_rank.b.to(dtype)) @ low_rank.a.to(dtype)) * low_rank.scaling
