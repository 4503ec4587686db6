"""The warm-up: the kernels that a model's steps start, each once on a few rows, before the first step.

Triton compiles a kernel for widths, dtypes and what strides are divisible by, and has it loaded by the driver when it
is started: in a first backward torch may hold the whole card by then, and a step that compiles is no step to be timed.
"""

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from lite.kernels import operators
from lite.model.mlp import activation_of, is_gated
from lite.model.norms import is_replaced
from lite.model.rotate import turn_of

ROWS = 2


def warm_up(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Start every kernel of `model` that computes on `device` in `dtype`; nothing where kernels are not at hand.

    The first to ask, it makes the trial (`lite.kernels.trial`). What it compiled is in Triton's cache on the disk.
    """
    x = torch.zeros(ROWS, 1, device=device, dtype=dtype)
    if not operators.at_hand(x):
        return
    modules = list(model.modules())
    for width, of_weight in {(len(m.weight), m.weight.dtype) for m in modules if is_replaced(m)}:
        rows, weight = x.new_zeros(ROWS, width), x.new_zeros(width, dtype=of_weight)
        _, scale = operators.rms_norm(rows, weight, 1e-6)
        operators.rms_norm_again(rows, weight, scale)
        operators.rms_norm_backward(rows, rows, weight, scale)
    mlps = [m for m in modules if is_gated(m) and isinstance(m.down_proj, nn.Linear) and activation_of(m)]
    for width, name in {(m.down_proj.in_features, activation_of(m).name) for m in mlps}:
        d_hidden, gate, up = x.new_zeros(3, ROWS, width)
        operators.gated(gate, up, name)
        operators.gated_backward_(d_hidden, gate, up, name)
    for heads, width in {sizes for m in modules if turn_of(type(m).forward) for sizes in _heads(m)}:
        turned = x.new_zeros(ROWS, ROWS, heads, width).transpose(1, 2)
        for tables in (1, ROWS):  # of packs, of padded rows
            cos = x.new_zeros(tables, ROWS, width)
            for backward in (False, True):
                operators.rotate(turned, cos, cos, backward=backward)
    if operators.four_bits_at_hand(x.new_zeros(1, dtype=torch.uint8)):
        states = [m.weight.quant_state for m in modules if isinstance(m, Linear4bit)]
        for blocksize, nested in {(s.blocksize, bool(s.nested)) for s in states if s.quant_type == "nf4"}:
            _four_bits(x, blocksize, nested)


def _heads(attention: nn.Module) -> list[tuple[int, int]]:
    """How many heads queries and keys have, and how wide they are; of a module that does not say so, nothing."""
    config, width = getattr(attention, "config", None), getattr(attention, "head_dim", None)
    names = [name for name in ("num_attention_heads", "num_key_value_heads") if hasattr(config, name)]
    return [] if width is None else [(getattr(config, name), width) for name in names]


def _four_bits(x: torch.Tensor, blocksize: int, nested: bool) -> None:
    """Of 4,096 weights, a number that 16 divides, as it does any model's."""
    exact = {"dtype": torch.float32}
    blocks = 4096 // blocksize
    scales = (x.new_zeros(256, **exact), x.new_zeros(-(-blocks // 256), **exact), x.new_zeros((), **exact))
    operators.four_bits(
        x.new_zeros(2048, 1, dtype=torch.uint8),
        x.new_zeros(blocks, dtype=torch.uint8 if nested else torch.float32),
        x.new_zeros(16, **exact),
        scales if nested else (),
        blocksize=blocksize, shape=(64, 64), dtype=x.dtype,
    )  # fmt: skip
