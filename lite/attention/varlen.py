"""Branch attention by flash attention as torch brings it: one call of its variable-length kernel for all branches.

Two twins. `plain_varlen` is torch's public function under autograd; `branch_varlen` runs the two operators beneath it.
It keeps keys and values as they came rather than gathered by branches, adds what the copies of a token get without
sorting them, always in the same order, and can leave its results to a recomputation (`kept`).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lite.attention import kept
from lite.attention.branches import BranchTable, Runs

_forward = torch.ops.aten._flash_attention_forward.default
_backward = torch.ops.aten._flash_attention_backward.default
FORWARD = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
BACKWARD = (
    "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused "
    "scale window_size_left window_size_right"
)


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, table: BranchTable, scaling: float | None, window: int | None
) -> Tensor:
    """The plain twin of `branch_varlen`."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped heads as they come; later versions have to be told.
    grouped = {"enable_gqa": True} if _takes(varlen_attn, "enable_gqa") else {}
    inputs = flash_inputs(query, key, value, table)
    return varlen_attn(*inputs, scale=scaling, window_size=window_size(window), **grouped)[None]


def branch_varlen(
    query: Tensor, key: Tensor, value: Tensor, table: BranchTable, scaling: float | None, window: int | None
) -> Tensor:
    """softmax(q kᵀ · scaling + mask) v by branches; the kernel's causal mask is aligned to the last key.

    query (1, heads, T, head_dim); key, value (1, kv heads, T, head_dim), bf16 or fp16 on CUDA.
    Returns (1, T, heads, head_dim). Kept for backward: the inputs, the result, and (heads, T) row sums.
    """
    if not operators_known():
        return plain_varlen(query, key, value, table, scaling, window)
    return _BranchVarlen.apply(query, key, value, table.runs(), scaling, window_size(window))


@functools.cache
def operators_known() -> bool:
    """Whether this torch's flash operators take the arguments that we give them (2.11 to 2.13 do)."""
    forward, backward = ([a.name for a in op._schema.arguments] for op in (_forward, _backward))
    wanted = FORWARD.split()
    return (
        forward[: len(wanted)] == wanted
        and {"scale", "window_size_left", "window_size_right"} <= set(forward)
        and backward == BACKWARD.split()
    )


def flash_inputs(query: Tensor, key: Tensor, value: Tensor, table: BranchTable) -> tuple[Tensor | int, ...]:
    """What variable-length flash kernels begin with: q, k, v (tokens, heads, head_dim), cumulative and longest runs."""
    runs = table.runs()
    return *_gathered(query, key, value, runs), runs.queries, runs.keys, runs.longest_queries, runs.longest_keys


def window_size(window: int | None) -> tuple[int, int]:
    """(keys before, keys after) that a query sees beside its own; −1 for all."""
    return (-1 if window is None else window - 1, 0)


class _BranchVarlen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        runs: Runs,
        scaling: float | None,
        size: tuple[int, int],
    ) -> Tensor:
        def attend() -> tuple[Tensor, Tensor]:
            inputs = _gathered(query, key, value, runs)
            result, log_sum, *_ = _forward(*inputs, *_lengths(runs, size), False, **_how(scaling, size))
            return result[None], log_sum

        result, log_sum = kept.once(attend)
        ctx.save_for_backward(query, key, value, result, log_sum)
        ctx.how = runs, scaling, size
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, log_sum = ctx.saved_tensors
        runs, scaling, size = ctx.how
        # The generator's state: without dropout the kernel does not read it.
        state = query.new_empty(2, dtype=torch.uint64), query.new_empty(0)
        inputs = _gathered(query, key, value, runs)
        d_query, *gathered = _backward(
            grad[0], *inputs, result[0], log_sum, *_lengths(runs, size), *state, **_how(scaling, size)
        )
        del inputs, result
        shared = []
        while gathered:
            shared.append(_returned(gathered.pop(0), runs))
        return *(t.transpose(0, 1)[None] for t in (d_query, *shared)), None, None, None


def _gathered(query: Tensor, key: Tensor, value: Tensor, runs: Runs) -> list[Tensor]:
    """(tokens, heads, head_dim) of each: queries as they are, keys and values of every run's path."""
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return [q, k, v] if runs.gather is None else [q, k.index_select(0, runs.gather), v.index_select(0, runs.gather)]


def _returned(part: Tensor, runs: Runs) -> Tensor:
    """The gradient of gathered keys, (keys, kv heads, head_dim), at the tokens that they came from, (T, …)."""
    if runs.gather is None:
        return part
    total = part.index_select(0, runs.own)
    # No token twice in one addition: so they need no sorting, and the sum does not depend on who comes first.
    for tokens, places in runs.copies:
        total.index_add_(0, tokens, part.index_select(0, places))
    return total


def _lengths(runs: Runs, size: tuple[int, int]) -> tuple[Any, ...]:
    """The operators' arguments from the cumulative lengths to whether it is causal, which with a window it is not."""
    return runs.queries, runs.keys, runs.longest_queries, runs.longest_keys, 0.0, size == (-1, 0)


def _how(scaling: float | None, size: tuple[int, int]) -> dict[str, Any]:
    return {"scale": scaling, "window_size_left": size[0], "window_size_right": size[1]}


@functools.cache
def _takes(function: Callable[..., Tensor], keyword: str) -> bool:
    return keyword in inspect.signature(function).parameters
