"""Operators that allocate inside, where a dispatch mode cannot see it: what each of them holds while it runs.

This is the only real error of a dry run, so it is one table. An entry takes the operator's arguments and gives the
extra bytes that are live at once while the operator runs, beside its inputs and outputs.
"""

from collections.abc import Callable
from typing import Any

import torch

Workspace = Callable[..., int]


def _varlen_backward(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_: Any, **__: Any) -> int:
    """Flash attention's own: d query in fp32, a row sum, and with grouped heads d key and d value of every head."""
    grouped = 2 * key.shape[0] * query.shape[1] * query.shape[2] * key.itemsize if key.shape[1] != query.shape[1] else 0
    return query.numel() * 4 + query.shape[0] * query.shape[1] * 4 + grouped


TABLE: dict[str, Workspace] = {
    "torch_attn::_varlen_attn_backward": _varlen_backward,
}


def workspace_bytes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes that the operator of this name (`aten::mm`) holds inside; 0 of all that are not in the table."""
    found = TABLE.get(name)
    return found(*args, **kwargs) if found else 0
