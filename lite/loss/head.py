"""token_logps: log-probabilities through the language-model head, without ever holding the whole logits.

The logits of 2,048 tokens over 152,064 words are 1.2 GB in fp32, and a naive loss holds three such buffers. Here a
chunk of tokens at a time goes through the head. What backward needs depends on what is trained:

frozen    a token's logp depends on its own hidden state alone, so its gradient row (p − onehot(label)) · W is computed
          in forward, while the chunk's logits exist. Backward scales rows: two matrix products in all, not three.
trained   backward computes each chunk again, for the weight's gradient needs the incoming coefficients.
low-rank  frozen weight plus (B A) · scaling, a LoRA on the head; as trained, but only A and B get gradients.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lite.loss import softmax


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
    if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_logps: hidden {tuple(hidden.shape)}, weight {tuple(head.weight.shape)}, labels "
            f"{tuple(labels.shape)}; expected (N, D), (V, D), (N,)"
        )
    hidden = hidden.to(head.weight.dtype)
    settings = _Settings(head, chunk_tokens, softmax.choose(kernel, hidden.device))
    if any(p is not None and p.requires_grad for p in head.parameters):
        return _Recomputed.apply(hidden, labels, settings, *head.parameters)
    return _RowsInForward.apply(hidden, labels, settings)


class _Settings(NamedTuple):
    head: Head
    chunk_tokens: int
    kernel: softmax.Kernel

    def chunks(self, count: int) -> list[slice]:
        return [slice(start, start + self.chunk_tokens) for start in range(0, count, self.chunk_tokens)]


class _RowsInForward(torch.autograd.Function):
    """The frozen head: rows (N, D) of d nll / d hidden are made in forward, backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, settings: _Settings) -> Tensor:
        head, needs_rows = settings.head, ctx.needs_input_grad[0]
        logps = hidden.new_empty(len(hidden), dtype=softmax.accumulator(hidden.dtype))
        rows = torch.empty_like(hidden) if needs_rows else None
        chunks = _Chunks(hidden, head, settings.chunk_tokens)
        for chunk in settings.chunks(len(hidden)):
            logits = chunks.logits(hidden[chunk])
            logps[chunk] = softmax.logps_in_place(logits, labels[chunk], head, slope=needs_rows, kernel=settings.kernel)
            if needs_rows:
                slope = chunks.rounded(logits)
                torch.mm(slope, head.weight, out=rows[chunk])
                if head.low_rank:
                    rows[chunk] += _through_low_rank(slope, head.low_rank, hidden.dtype)
                del slope
            del logits  # else it lives beside the next chunk's
        if needs_rows:
            ctx.save_for_backward(rows)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return rows * grad.neg().to(rows.dtype)[:, None], None, None


class _Recomputed(torch.autograd.Function):
    """The trained or low-rank head: forward keeps hidden alone, backward computes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, settings: _Settings, *parameters: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, labels, *parameters)
        ctx.settings = settings
        logps = hidden.new_empty(len(hidden), dtype=softmax.accumulator(hidden.dtype))
        chunks = _Chunks(hidden, settings.head, settings.chunk_tokens)
        for chunk in settings.chunks(len(hidden)):
            logits = chunks.logits(hidden[chunk])
            logps[chunk] = softmax.logps_in_place(
                logits, labels[chunk], settings.head, slope=False, kernel=settings.kernel
            )
            del logits
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, labels, weight, bias, a, b = ctx.saved_tensors
        head, needs = ctx.settings.head, dict(zip(_INPUTS, ctx.needs_input_grad, strict=True))
        d_hidden = torch.empty_like(hidden) if needs["hidden"] else None
        # Sums over chunks are kept in fp32: hundreds of bf16 additions would lose what the later chunks add.
        sums = {
            name: torch.zeros_like(parameter, dtype=softmax.accumulator(parameter.dtype))
            for name, parameter in zip(_INPUTS[3:], (weight, bias, a, b), strict=True)
            if needs[name]
        }
        chunks = _Chunks(hidden, head, ctx.settings.chunk_tokens)
        for chunk in ctx.settings.chunks(len(hidden)):
            h = hidden[chunk]
            logits = chunks.logits(h)
            softmax.logps_in_place(logits, labels[chunk], head, slope=True, kernel=ctx.settings.kernel)
            slope = chunks.rounded(logits.mul_(grad[chunk].neg()[:, None]))
            del logits
            if needs["hidden"]:
                torch.mm(slope, weight, out=d_hidden[chunk])
                if head.low_rank:
                    d_hidden[chunk] += _through_low_rank(slope, head.low_rank, h.dtype)
            if needs["weight"]:
                sums["weight"] += _precise(slope.t(), h)
            if needs["bias"]:
                sums["bias"] += slope.sum(0, dtype=sums["bias"].dtype)
            if needs["b"]:
                sums["b"] += _precise(slope.t(), h @ a.to(h.dtype).t()) * head.low_rank.scaling
                sums["a"] += _precise((slope @ b.to(h.dtype)).t(), h) * head.low_rank.scaling
            del slope
        dtype = {"weight": weight, "bias": bias, "a": a, "b": b}
        return d_hidden, None, None, *(sums[n].to(dtype[n].dtype) if n in sums else None for n in _INPUTS[3:])


_INPUTS = ("hidden", "labels", "settings", "weight", "bias", "a", "b")  # of _Recomputed.forward


def _precise(left: Tensor, right: Tensor) -> Tensor:
    """left · right, not rounded to bf16."""
    dtype = softmax.accumulator(left.dtype)
    if left.is_cuda and dtype != left.dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


class _Chunks:
    """The logits of one chunk after another.

    On a CPU all chunks use the same two buffers: there, touching fresh pages takes longer than the softmax itself. On
    CUDA the allocator does this, and the product need not be rounded to bf16 on its way.
    """

    def __init__(self, hidden: Tensor, head: Head, chunk_tokens: int) -> None:
        self.head, self.dtype, self.precise = head, hidden.dtype, softmax.accumulator(hidden.dtype)
        self.reuse = not hidden.is_cuda
        if self.reuse:
            shape = min(chunk_tokens, len(hidden)), len(head.weight)
            self.buffer = hidden.new_empty(shape, dtype=self.precise)
            self.product = self.buffer if self.dtype == self.precise else hidden.new_empty(shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """h Wᵀ + bias, before scale and softcap, (C, V) in the dtype in which the softmax is taken."""
        if self.reuse:
            logits = self.buffer[: len(hidden)]
            product = torch.mm(hidden, self.head.weight.t(), out=self.product[: len(hidden)])
            if product.dtype != logits.dtype:
                logits.copy_(product)
        elif self.dtype != self.precise:
            logits = torch.mm(hidden, self.head.weight.t(), out_dtype=self.precise)
        else:
            logits = torch.mm(hidden, self.head.weight.t())
        if self.head.low_rank:
            a, b, scaling = self.head.low_rank
            logits += ((hidden @ a.to(self.dtype).t()) @ b.to(self.dtype).t()).to(self.precise).mul_(scaling)
        if self.head.bias is not None:
            logits += self.head.bias
        return logits

    def rounded(self, logits: Tensor) -> Tensor:
        """The logits, by now slopes, in the dtype of the products that follow."""
        if self.reuse and self.dtype != self.precise:
            return self.product[: len(logits)].copy_(logits)
        return logits.to(self.dtype)


def _through_low_rank(slope: Tensor, low_rank: LowRank, dtype: torch.dtype) -> Tensor:
    """slope · (scaling · B A), (C, D)."""
    return ((slope @ low_rank.b.to(dtype)) @ low_rank.a.to(dtype)) * low_rank.scaling
