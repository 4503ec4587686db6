"""Operators that allocate inside, where a dispatch mode cannot see it: what each of them holds while it runs.

This is the only real error of a dry run, so it is one table. An entry takes the operator's arguments and gives the
extra bytes that are live at once while the operator runs, beside its inputs and outputs.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Workspace = Callable[..., int]


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, cumulative: Tensor, *_: Any,
    **__: Any,
) -> int:  # fmt: skip
    """Flash attention 2 on (tokens, heads, head_dim): d query and a row sum in fp32, each run of queries padded by 128;
    with grouped heads d key and d value of every head; copies of what is not contiguous.

    Source: mha_varlen_bwd in torch's flash_api.cpp, and _flash_attention_backward above it.
    """
    tokens, heads, width = query.shape
    rows = (tokens + 128 * (len(cumulative) - 1)) * heads
    rounding = 32 if width <= 128 else 64
    grouped = 2 * key.shape[0] * heads * width * key.itemsize if key.shape[1] != heads else 0
    copies = sum(t.numel() * t.itemsize for t in (grad, out) if not t.is_contiguous())
    return rows * (-(-width // rounding) * rounding + 1) * 4 + grouped + copies


TABLE: dict[str, Workspace] = {
    "aten::_flash_attention_backward": _flash_backward,
    "torch_attn::_varlen_attn_backward": _flash_backward,  # which calls it
}


def workspace_bytes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes that the operator of this name (`aten::mm`) holds inside; 0 of all that are not in the table."""
    found = TABLE.get(name)
    return found(*args, **kwargs) if found else 0
