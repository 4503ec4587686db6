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
        chunks = _Chunks(hidden, settings)
        for chunk in settings.chunks(len(hidden)):
            logps[chunk], slope = chunks.logps_and_slope(hidden[chunk], labels[chunk], slope=needs_rows)
            if slope is not None:
                torch.mm(slope, head.weight, out=rows[chunk])
                if head.low_rank:
                    rows[chunk] += _through_low_rank(slope, head.low_rank, hidden.dtype)
                del slope  # else it lives beside the next chunk's logits
        if needs_rows:
            ctx.save_for_backward(rows)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        # Not rounded to bf16 first: a completion's tokens share their coefficient, so its error would not average out.
        return torch.mul(rows, grad.neg()[:, None], out=torch.empty_like(rows)), None, None


class _Recomputed(torch.autograd.Function):
    """The trained or low-rank head: forward keeps hidden alone, backward computes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, settings: _Settings, *parameters: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, labels, *parameters)
        ctx.settings = settings
        logps = hidden.new_empty(len(hidden), dtype=softmax.accumulator(hidden.dtype))
        chunks = _Chunks(hidden, settings)
        for chunk in settings.chunks(len(hidden)):
            logps[chunk], _ = chunks.logps_and_slope(hidden[chunk], labels[chunk], slope=False)
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
        chunks = _Chunks(hidden, ctx.settings)
        for chunk in ctx.settings.chunks(len(hidden)):
            h = hidden[chunk]
            _, slope = chunks.logps_and_slope(h, labels[chunk], slope=True, coefficients=grad[chunk].neg())
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
    """One chunk of logits after another: h Wᵀ + bias, the softmax, and its slope in the dtype of h.

    On a CPU all chunks use the same buffer, for touching fresh pages takes longer than the softmax; which goes a few
    rows at a time, so that its many passes stay in the cache. On CUDA the allocator and the kernel see to both, and
    the product is not rounded to bf16 on its way to the softmax.
    """

    TILE_ROWS = 4  # of 150,000 words in fp32: 2.4 MB

    def __init__(self, hidden: Tensor, settings: _Settings) -> None:
        self.settings, self.dtype, self.precise = settings, hidden.dtype, softmax.accumulator(hidden.dtype)
        words = len(settings.head.weight)
        self.buffer = self.tile = None
        if not hidden.is_cuda:
            self.buffer = hidden.new_empty(min(settings.chunk_tokens, len(hidden)), words)
            if self.dtype != self.precise:
                self.tile = hidden.new_empty(self.TILE_ROWS, words, dtype=self.precise)

    def logps_and_slope(
        self, hidden: Tensor, labels: Tensor, *, slope: bool, coefficients: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (C,) and, if asked for, d nll / d product (C, V), rows times `coefficients` if given."""
        product = self._product(hidden)
        logps = product.new_empty(len(hidden), dtype=self.precise)
        size = self.TILE_ROWS if self.buffer is not None else len(hidden)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = self._precise_rows(product[rows])
            self._add_terms(logits, hidden[rows])
            head, kernel = self.settings.head, self.settings.kernel
            logps[rows] = softmax.logps_in_place(logits, labels[rows], head, slope=slope, kernel=kernel)
            if coefficients is not None:
                logits.mul_(coefficients[rows, None])
            if slope and logits.dtype != product.dtype:
                product[rows] = logits
        return logps, product.to(self.dtype) if slope else None

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


def _through_low_rank(slope: Tensor, low_rank: LowRank, dtype: torch.dtype) -> Tensor:
    """slope · (scaling · B A), (C, D)."""
    return ((slope @ low_rank.b.to(dtype)) @ low_rank.a.to(dtype)) * low_rank.scaling
