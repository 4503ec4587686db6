"""Attention over packs: a token sees its own branch so far, and its ancestors; nothing else.

Registered with transformers under one name, so that a model runs unchanged. The table of branches reaches the attention
function as a keyword of the backbone's forward; no mask function is registered, so no model builds a mask.
Which queries see which keys is `branches.py`; here are the kernels that compute it, and the choice among them.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from lite.attention import kept
from lite.attention.branches import BranchTable, Implementation
from lite.attention.cpu import branch_sdpa
from lite.attention.varlen import branch_varlen, flash_inputs, operators_known, window_size
from lite.device import kind
from lite.errors import ModelError

NAME = "lite_branches"
# Keywords that some model passes and that change nothing here: the table of branches says it all.
HARMLESS = {"is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"}


def install(model: nn.Module, *, padded: bool = False) -> None:
    """Let `model` run on packs: its backbone's forward then takes `branch_table=`; or on padded batches with a mask."""
    supported = all(part._supports_sdpa for part in model.modules() if isinstance(part, PreTrainedModel))
    for config in _configs(model):
        config._attn_implementation = _plain(config, supported) if padded else NAME


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Within: the model attends as transformers has it, for generation and for comparison."""
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    install(model, padded=True)
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _configs(model: nn.Module) -> list[Any]:
    configs = {
        id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")
    }
    return list(configs.values())


def _plain(config: Any, supported: bool) -> str:
    # transformers' SDPA leaves out caps and sinks without a word, and builds no causal mask for a model that is to
    # use its own attention: only eager attention has them all.
    return "eager" if config.to_dict().get("attn_logit_softcapping") or not supported else "sdpa"


def branch_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, T, head_dim)
    key: Tensor,  # (1, kv heads, T, head_dim)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    branch_table: BranchTable | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """softmax(q kᵀ · scaling + mask) v by branches, (1, T, heads, head_dim). Raises ModelError on what it lacks."""
    unknown = {name: value for name, value in others.items() if value is not None and name not in HARMLESS}
    if branch_table is None or attention_mask is not None or dropout or unknown:
        raise ModelError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown) or 'a mask or dropout'}, which packs "
            "do not have. Use attn_implementation: padded."
        )
    implementation = _choose(branch_table.implementation, query, softcap)
    if kept.asked() and not can_keep(implementation, kind(query)):
        raise ModelError(
            f"The results of attention cannot be kept for recomputed layers with attn_implementation = "
            f"{implementation} on {kind(query)}, which this model and device take. Leave it out: --no-keep-attention."
        )
    attend = {"varlen": _varlen, "flash": _flash, "sdpa": _sdpa, "eager": _eager}[implementation]
    return attend(query, key, value, branch_table, scaling, sliding_window, softcap), None


def can_keep(implementation: str, device_type: str) -> bool:
    """Whether attention can leave its results to the recomputation of its layer (`checkpoint_layers`).

    Those of torch's own variable-length kernel and of the CPU's can; the flash-attn package's and the plain twin's, and
    padded batches, which run transformers' attention, cannot. `auto` can unless the model caps its scores, or on CUDA
    computes in fp32: then attention raises ModelError when it is asked to.
    """
    if implementation == "sdpa":
        return device_type != "cuda"
    return implementation == "auto" or (implementation == "varlen" and operators_known())


def _choose(implementation: Implementation, query: Tensor, softcap: float | None) -> Implementation:
    """The kernel for this call. `auto` takes the fastest that honours it; one named by the user must."""
    width = query.shape[-1]
    half = kind(query) == "cuda" and query.dtype in (torch.bfloat16, torch.float16) and width <= 256 and width % 8 == 0
    if implementation == "auto":
        implementation = ("varlen" if half else "sdpa") if softcap is None else "eager"
        if half and softcap is not None and _flash_attn() is not None:
            implementation = "flash"
    if implementation in ("varlen", "flash") and not half:
        raise ModelError(
            f"attn_implementation = {implementation}: needs CUDA, bfloat16 and heads of a multiple of 8 up to 256, but "
            f"got {query.dtype} on {kind(query)} with heads of {width}. Use auto, sdpa or eager."
        )
    if softcap is not None and implementation in ("varlen", "sdpa"):
        raise ModelError(
            f"attn_implementation = {implementation}: has no cap on scores ({softcap}). Use auto or eager."
        )
    return implementation


def _gather(tensor: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """The tokens of `spans` of (1, heads, T, head_dim), a view if they are one run."""
    parts = [tensor[:, :, start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _by_segment(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def whole(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: BranchTable,
        scaling: float | None,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        outputs = []
        for segment in table.segments:
            q = query[:, :, segment.start : segment.end]
            k, v = _gather(key, segment.spans), _gather(value, segment.spans)
            outputs.append(attend(q, k, v, table, scaling, window if window and window < segment.keys else None, cap))
        return torch.cat(outputs, 2).transpose(1, 2).contiguous()

    return whole


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, table: BranchTable, scaling: float | None, window: int | None, cap: None
) -> Tensor:
    """torch's scaled-dot-product attention, one call for each run of queries."""
    if kind(query) != "cuda":
        return branch_sdpa(query, key, value, table, scaling, window)
    return _sdpa_of_segments(query, key, value, table, scaling, window, cap)


@_by_segment
def _sdpa_of_segments(
    q: Tensor, k: Tensor, v: Tensor, table: BranchTable, scaling: float | None, window: int | None, cap: None
) -> Tensor:
    causal = q.shape[2] == k.shape[2] and window is None
    mask = None if causal else table.mask(q.shape[2], k.shape[2], window, q.dtype)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped)


@_by_segment
def _eager(
    q: Tensor, k: Tensor, v: Tensor, table: BranchTable, scaling: float | None, window: int | None, cap: float | None
) -> Tensor:
    """The plain twin: the whole matrix of scores, in the order in which transformers' eager attention rounds."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    scores = scores + table.mask(q.shape[2], k.shape[2], window, q.dtype)
    return torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, table: BranchTable, scaling: float | None, window: int | None, cap: None
) -> Tensor:
    """Flash attention as torch brings it, one call for all branches."""
    return branch_varlen(query, key, value, table, scaling, window)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BranchTable,
    scaling: float | None,
    window: int | None,
    cap: float | None,
) -> Tensor:
    """The flash-attn package: as `_varlen`, and it has a cap on scores."""
    flash = _flash_attn()
    if flash is None:
        raise ModelError("attn_implementation = flash: the package is missing. pip install flash-attn, or use auto.")
    inputs, size = flash_inputs(query, key, value, table), window_size(window)
    return flash(*inputs, softmax_scale=scaling, causal=True, window_size=size, softcap=cap or 0.0)[None]


@functools.cache
def _flash_attn() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


AttentionInterface.register(NAME, branch_attention)
