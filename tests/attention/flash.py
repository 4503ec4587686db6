"""torch's flash operators in plain operations on a CPU, where torch has none: the referee of what we call them with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def flash_on_cpu() -> Iterator[None]:
    """Within: `aten::_flash_attention_forward` and `_backward` run on a CPU, in any floating dtype."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def forward(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale, window_size_left,
    window_size_right, **unused,
):  # fmt: skip
    """Masks end at the last key, and a left window of W keeps W + 1 keys."""
    assert not any(value is not None for value in unused.values())
    assert is_causal == (window_size_left < 0)
    assert window_size_right == 0
    assert cu_q.dtype == cu_k.dtype == torch.int32
    out = torch.empty_like(q)
    log_sum = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    for a, b, c, d in runs(cu_q, cu_k, max_q, max_k):
        scores = scores_of(q[a:b], k[c:d], scale, window_size_left)
        log_sum[:, a:b] = scores.logsumexp(-1)
        out[a:b] = torch.einsum("hqk,khw->qhw", scores.softmax(-1), spread(v[c:d], q))
    state = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
    return out, log_sum, *state, q.new_empty(0)


def backward(
    grad, q, k, v, out, log_sum, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, state, unused, *, scale,
    window_size_left, window_size_right,
):  # fmt: skip
    """From the result and the row sums, as the kernel has it: they must be those of this q, k, v."""
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for a, b, c, d in runs(cu_q, cu_k, max_q, max_k):
        weights = (scores_of(q[a:b], k[c:d], scale, window_size_left) - log_sum[:, a:b, None]).exp()
        weights = weights.to(q.dtype)
        d_weights = torch.einsum("qhw,khw->hqk", grad[a:b], spread(v[c:d], q))
        own = (grad[a:b] * out[a:b]).sum(-1).t()[..., None]  # (heads, queries, 1)
        d_scores = (weights * (d_weights - own) * scale).to(q.dtype)
        d_q[a:b] = torch.einsum("hqk,khw->qhw", d_scores, spread(k[c:d], q))
        for total, left, right in ((d_k, d_scores, q), (d_v, weights, grad)):
            part = torch.einsum("hqk,qhw->khw", left, right[a:b])
            total[c:d] = part.unflatten(1, (k.shape[1], -1)).sum(2)
    return d_q, d_k, d_v


def runs(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> list[tuple[int, int, int, int]]:
    assert max_q == cu_q.diff().max()
    assert max_k == cu_k.diff().max()
    queries, keys = cu_q.tolist(), cu_k.tolist()
    return list(zip(queries, queries[1:], keys, keys[1:], strict=False))


def scores_of(q: Tensor, k: Tensor, scale: float, left: int) -> Tensor:
    behind = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    hidden = (behind < 0) | ((behind > left) & (left >= 0))
    return (torch.einsum("qhw,khw->hqk", q, spread(k, q)) * scale).masked_fill(hidden, float("-inf"))


def spread(shared: Tensor, q: Tensor) -> Tensor:
    """Keys or values of every query head."""
    return shared.repeat_interleave(q.shape[1] // shared.shape[1], 1)
