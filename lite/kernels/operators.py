"""The operators `lite::…`: RMSNorm, an MLP's gated product, the rotary turn, NF4 weights, each in one pass over memory.

Operators of torch, so that a dispatch mode sees each of them as one, on meta as well as on a GPU. They have no
gradient: autograd Functions call them. On a CPU the same kernels run in Triton's interpreter, for tests. Who calls them
asks `at_hand` first and has a plain twin for where they are not.
"""

import math
import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lite.device import kind
from lite.kernels import trial

Activation = Literal["silu", "gelu_tanh"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_library = torch.library.Library("lite", "DEF")
_library.define("rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)")
_library.define("rms_norm_again(Tensor x, Tensor weight, Tensor scale) -> Tensor")
_library.define("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> Tensor")
_library.define("gated(Tensor gate, Tensor up, str activation) -> Tensor")
# What is overwritten is returned as well: so it counts as read and as written.
_library.define(
    "gated_backward_(Tensor d_hidden, Tensor(a!) gate, Tensor(b!) up, str activation) -> (Tensor(a!), Tensor(b!))"
)
_library.define("rotate(Tensor x, Tensor cos, Tensor sin, bool backward) -> Tensor")
_library.define(
    "four_bits(Tensor packed, Tensor absmax, Tensor code, Tensor? code2, Tensor? absmax2, Tensor? offset,"
    " int blocksize, SymInt[] shape, ScalarType dtype) -> Tensor"
)


def at_hand(x: Tensor) -> bool:
    """Whether these operators run for `x`: bf16, fp16 or fp32 on CUDA, if a trial there (`lite.kernels.trial`) passed.

    On meta that stands for CUDA as that trial went, and if none was made they do. With TRITON_INTERPRET=1 on a CPU as
    well. The first question for a device makes the trial, which waits for it.
    """
    return x.dtype in DTYPES and _verdict(x).kernels


def four_bits_at_hand(packed: Tensor) -> bool:
    """The same of `four_bits`, for a packed weight: it may be left out alone."""
    return packed.dtype == torch.uint8 and _verdict(packed).four_bits


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """weight · x / √(mean(x²) + epsilon) and that 1 / √…: (T, D) in x's dtype and (T, 1) fp32.

    x (T, D), rows at any stride; weight (D,). The quotient is computed in fp32 and rounded to x's dtype before the
    weight, as transformers has it.
    """
    assert x.shape[1:] == weight.shape, f"rows {tuple(x.shape)}, weight {tuple(weight.shape)}"
    return torch.ops.lite.rms_norm.default(_whole(x), weight, epsilon)


def rms_norm_again(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The result of `rms_norm` made again of the (T, 1) that it gave, bit for bit."""
    assert x.shape[1:] == weight.shape, f"rows {tuple(x.shape)}, weight {tuple(weight.shape)}"
    assert scale.numel() == len(x), f"rows {tuple(x.shape)}, scale {tuple(scale.shape)}"
    return torch.ops.lite.rms_norm_again.default(_whole(x), weight, scale)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """d x of `rms_norm`, (T, D) in x's dtype: scale · (g − u · mean(g · u)), where g = grad · weight and u = x · scale.

    grad, x (T, D), rows at any stride; g is rounded as a product of grad and weight is, all else is fp32.
    """
    assert x.shape[1:] == weight.shape, f"rows {tuple(x.shape)}, weight {tuple(weight.shape)}"
    assert grad.shape == x.shape, f"grad {tuple(grad.shape)}, rows {tuple(x.shape)}"
    assert scale.numel() == len(x), f"rows {tuple(x.shape)}, scale {tuple(scale.shape)}"
    return torch.ops.lite.rms_norm_backward.default(_whole(grad), _whole(x), weight, scale)


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """act(gate) · up, (T, F): act in fp32 and rounded to the dtype before the product.

    gate, up (T, F) of one dtype, rows at any stride: they may be two halves of one tensor.
    """
    assert gate.shape == up.shape, f"gate {tuple(gate.shape)}, up {tuple(up.shape)}"
    assert gate.dtype == up.dtype, f"gate {gate.dtype}, up {up.dtype}"
    return torch.ops.lite.gated.default(_whole(gate), _whole(up), activation)


def gated_backward_(d_hidden: Tensor, gate: Tensor, up: Tensor, activation: Activation) -> None:
    """Overwrite gate and up with their gradients, of hidden = act(gate) · up and d_hidden.

    All (T, F) of one dtype; gate's and up's last dimension is contiguous. d up = act(gate) · d_hidden and d gate =
    act′(gate) · (d_hidden · up), in fp32, act(gate) and d_hidden · up rounded to the dtype as by autograd.
    Autograd is not told: the caller raises the versions of gate and up (`torch.autograd.graph.increment_version`).
    """
    assert gate.shape == up.shape == d_hidden.shape, f"gate {tuple(gate.shape)}, d_hidden {tuple(d_hidden.shape)}"
    assert gate.dtype == up.dtype == d_hidden.dtype, f"gate {gate.dtype}, up {up.dtype}, d_hidden {d_hidden.dtype}"
    assert gate.stride(-1) == up.stride(-1) == 1, f"gate's strides {gate.stride()}, up's {up.stride()}"
    torch.ops.lite.gated_backward_.default(_whole(d_hidden), gate, up, activation)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> Tensor:
    """x · cos + rotate_half(x) · sin, where rotate_half(x₁, x₂) = (−x₂, x₁); `backward`: the transpose of that map.

    x (B, H, T, d) of any strides, d even; cos, sin (1 or B, T, d). Each product and the sum are rounded to the dtype
    that x · cos has, as transformers rounds; that is the result's dtype. Its shape is x's, its memory laid out as
    (B, T, H, d), so that heads are merged without a copy.
    """
    batch, _, tokens, width = x.shape
    assert cos.shape == sin.shape, f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
    assert cos.dtype == sin.dtype, f"cos {cos.dtype}, sin {sin.dtype}"
    assert cos.shape in ((1, tokens, width), (batch, tokens, width)), f"x {tuple(x.shape)}, cos {tuple(cos.shape)}"
    assert width % 2 == 0, f"a head of {width}"
    return torch.ops.lite.rotate.default(x, cos.contiguous(), sin.contiguous(), backward)  # (B, H, T, d)


def four_bits(
    packed: Tensor, absmax: Tensor, code: Tensor, nested: tuple[Tensor, ...], *,
    blocksize: int, shape: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What an NF4 weight stands for, in its shape and in `dtype`: code[half a byte] · scale of its block.

    packed (bytes, 1) uint8, the first weight of each two in the high half; code (16,) fp32; absmax (blocks,) fp32 is
    the scales, or uint8, and they are code2[absmax] · absmax2 + offset with nested = code2 (256,), absmax2 (one for
    each 256 blocks), offset (), all fp32. blocksize: a power of two in [32, 4096]. Bit for bit what bitsandbytes gives.
    """
    count = math.prod(shape)
    assert packed.dtype == torch.uint8, f"packed in {packed.dtype}"
    assert packed.numel() == (count + 1) // 2, f"{packed.numel()} bytes of {count} weights"
    assert absmax.dtype == (torch.uint8 if nested else torch.float32), f"absmax in {absmax.dtype}"
    assert absmax.numel() == -(-count // blocksize), f"{absmax.numel()} scales of {count} weights"
    assert 32 <= blocksize <= 4096, f"blocks of {blocksize}"
    assert blocksize & (blocksize - 1) == 0, f"blocks of {blocksize}"
    code2, absmax2, offset = nested or (None, None, None)
    if absmax2 is not None:
        assert absmax2.numel() == -(-absmax.numel() // 256), f"{absmax2.numel()} for {absmax.numel()} scales"
    return torch.ops.lite.four_bits.default(packed, absmax, code, code2, absmax2, offset, blocksize, shape, dtype)


def _verdict(x: Tensor) -> trial.Verdict:
    place = kind(x)
    if place == "cuda" or (_INTERPRETED and place == "cpu"):
        return trial.verdict(x.device, place)
    return trial.NEITHER


def _whole(rows: Tensor) -> Tensor:
    """Rows of which each is one piece of memory."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _empty_rows(x: Tensor) -> Tensor:  # by torch.empty: on meta new_empty takes twice as long
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _empty_turned(x: Tensor, cos: Tensor) -> Tensor:
    batch, heads, tokens, width = x.shape
    dtype = torch.promote_types(x.dtype, cos.dtype)
    return torch.empty(batch, tokens, heads, width, dtype=dtype, device=x.device).transpose(1, 2)


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    from lite.kernels import rms_norm as kernels

    result, scale = _rms_norm_on_meta(x, weight, epsilon)
    with torch.cuda.device_of(x):
        kernels.forward(x, weight, epsilon, result=result, scale=scale)
    return result, scale


def _rms_norm_on_meta(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return _empty_rows(x), torch.empty(len(x), 1, dtype=torch.float32, device=x.device)


def _rms_norm_again(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    from lite.kernels import rms_norm as kernels

    result = _empty_rows(x)
    with torch.cuda.device_of(x):
        kernels.again(x, weight, scale, result=result)
    return result


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    from lite.kernels import rms_norm as kernels

    result = _empty_rows(x)
    with torch.cuda.device_of(x):
        kernels.backward(grad, x, weight, scale, result=result)
    return result


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    from lite.kernels import gated as kernels

    result = _empty_rows(gate)
    with torch.cuda.device_of(gate):
        kernels.forward(gate, up, activation, result=result)
    return result


def _gated_backward_(d_hidden: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    from lite.kernels import gated as kernels

    with torch.cuda.device_of(gate):
        kernels.backward_(d_hidden, gate, up, activation)
    return gate, up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    from lite.kernels import rotary as kernels

    result = _empty_turned(x, cos)
    with torch.cuda.device_of(x):
        kernels.rotate(x, cos, sin, result=result, backward=backward)
    return result


def _four_bits(
    packed: Tensor, absmax: Tensor, code: Tensor, code2: Tensor | None, absmax2: Tensor | None, offset: Tensor | None,
    blocksize: int, shape: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    from lite.kernels import nf4 as kernels

    result = torch.empty(shape, dtype=dtype, device=packed.device)
    nested = () if code2 is None else (code2, absmax2, offset)
    with torch.cuda.device_of(packed):
        kernels.four_bits(packed, absmax, code, nested, blocksize, result=result)
    return result


for _name, _kernel, _on_meta in (
    ("rms_norm", _rms_norm, _rms_norm_on_meta),
    ("rms_norm_again", _rms_norm_again, lambda x, weight, scale: _empty_rows(x)),
    ("rms_norm_backward", _rms_norm_backward, lambda grad, x, weight, scale: _empty_rows(x)),
    ("gated", _gated, lambda gate, up, activation: _empty_rows(gate)),
    ("gated_backward_", _gated_backward_, lambda d_hidden, gate, up, activation: (gate, up)),
    ("rotate", _rotate, lambda x, cos, sin, backward: _empty_turned(x, cos)),
    ("four_bits", _four_bits, lambda *given: torch.empty(given[-2], dtype=given[-1], device="meta")),
):
    _library.impl(_name, _kernel, "CUDA")
    _library.impl(_name, _kernel, "CPU")
    _library.impl(_name, _on_meta, "Meta")
