"""Branch attention on a CPU: torch's flash kernel on each run of queries, and a backward that adds in place.

Left to autograd, every slice of queries, keys or values costs a zero-filled tensor of the whole pack in backward, which
for short branches takes longer than the attention itself. Grouped heads are folded into the batch, so that keys and
values are not repeated for each query head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lite.attention import kept
from lite.attention.branches import BranchTable, Segment

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def branch_sdpa(
    query: Tensor, key: Tensor, value: Tensor, table: BranchTable, scaling: float | None, window: int | None
) -> Tensor:
    """softmax(q kᵀ · scaling + mask) v by branches.

    query (1, heads, T, head_dim); key, value (1, kv heads, T, head_dim), all on the CPU.
    Returns (1, T, heads, head_dim). Kept for backward: the inputs, the result, and (heads, T) row sums.
    """
    return _BranchSdpa.apply(query, key, value, table, scaling, window)


class _BranchSdpa(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: BranchTable,
        scaling: float | None,
        window: int | None,
    ) -> Tensor:
        result, *sums = kept.once(lambda: _attend(query, key, value, table, scaling, window))
        ctx.save_for_backward(query, key, value, result, *sums)
        ctx.how = table, scaling, window
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, *sums = ctx.saved_tensors
        table, scaling, window = ctx.how
        kv_heads = key.shape[1]
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        d_queries = _fold(d_query, kv_heads)
        grads, results = (_fold(t.transpose(1, 2), kv_heads) for t in (grad, result))
        for segment, log_sum in zip(table.segments, sums, strict=True):
            q, k, v = _inputs(query, key, value, segment)
            causal, mask = _mask(table, segment, window, query.dtype)
            run = slice(segment.start, segment.end)
            dq, dk, dv = _backward(
                grads[:, :, run].contiguous(), q, k, v, results[:, :, run].contiguous(), log_sum, 0.0, causal,
                attn_mask=mask, scale=scaling,
            )  # fmt: skip
            d_queries[:, :, run] = dq
            for total, part in ((d_key, dk), (d_value, dv)):
                _scatter(total, part.sum(1) if part.shape[1] > 1 else part[:, 0], segment)
        return d_query, d_key, d_value, None, None, None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, table: BranchTable, scaling: float | None, window: int | None
) -> tuple[Tensor, ...]:
    """The result (1, T, heads, head_dim), and the row sums of each run of queries."""
    _, heads, tokens, width = query.shape
    result = query.new_empty(1, tokens, heads, width)
    folded = _fold(result.transpose(1, 2), key.shape[1])
    sums = []
    for segment in table.segments:
        q, k, v = _inputs(query, key, value, segment)
        causal, mask = _mask(table, segment, window, query.dtype)
        out, log_sum = _forward(q, k, v, 0.0, causal, attn_mask=mask, scale=scaling)
        folded[:, :, segment.start : segment.end] = out
        sums.append(log_sum)
    return result, *sums


def _fold(tensor: Tensor, kv_heads: int) -> Tensor:
    """(1, heads, T, head_dim) as (kv heads, group, T, head_dim), a view."""
    return tensor[0].unflatten(0, (kv_heads, -1))


def _inputs(query: Tensor, key: Tensor, value: Tensor, segment: Segment) -> list[Tensor]:
    """Queries of the segment and its keys and values, (kv heads, group, …, head_dim); the group shares its keys."""
    kv_heads = key.shape[1]
    q = _fold(query[:, :, segment.start : segment.end], kv_heads)
    shared = []
    for tensor in (key, value):
        parts = [tensor[0, :, start:end] for start, end in segment.spans]
        gathered = parts[0] if len(parts) == 1 else torch.cat(parts, 1)  # (kv heads, keys, head_dim)
        shared.append(gathered[:, None].expand(-1, q.shape[1], -1, -1))
    return [q, *shared]


def _mask(table: BranchTable, segment: Segment, window: int | None, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    queries, keys = segment.end - segment.start, segment.keys
    reach = window if window and window < keys else None
    if queries == keys and reach is None:
        return True, None
    return False, table.mask(queries, keys, reach, dtype)


def _scatter(total: Tensor, part: Tensor, segment: Segment) -> None:
    """Add the gradient of gathered keys, (kv heads, keys, head_dim), to the tokens that they came from."""
    at = 0
    for start, end in segment.spans:
        total[0, :, start:end] += part[:, at : at + end - start]
        at += end - start
