"""Products with a frozen weight, whatever it is stored as: NF4, int8, or as it is.

A quantised weight is dequantised for one product and freed right after: once forward, once backward, kept by neither;
but in a layer that is told to `serve_backward`, the one of forward serves both.
So a product is the same in any layout, in training and out of it, and the numbers of a token are its own.
"""

from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_blockwise
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lite.kernels import operators


def is_frozen(layer: nn.Module, x: Tensor) -> bool:
    """Whether `product` computes what the layer does: a frozen linear of a known kind that multiplies in x's dtype."""
    # Its own alone, for a linear has no others: this is asked for each layer at every pass.
    if not isinstance(layer, nn.Linear) or any(p is not None and p.requires_grad for p in layer._parameters.values()):
        return False
    if isinstance(layer, Linear4bit):
        return compute_dtype(layer, x) == x.dtype
    return isinstance(layer, Linear8bitLt) or (type(layer) is nn.Linear and layer.weight.dtype == x.dtype)


def compute_dtype(layer: Linear4bit, x: Tensor) -> torch.dtype:
    """What a 4-bit layer multiplies in: as it was built, else as x comes."""
    return layer.compute_dtype or x.dtype


def weight_of(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in `dtype`: a buffer of its own if it is quantised, else the parameter itself."""
    if isinstance(layer, Linear4bit):
        return from_four_bits(layer.weight.detach(), layer.weight.quant_state, dtype)
    if isinstance(layer, Linear8bitLt):
        return _from_int8(layer, dtype)
    return layer.weight


def from_four_bits(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """What a 4-bit weight stands for, in `dtype`; packed (bytes, 1) uint8, two weights each.

    The same bits by the kernel, where there is one, as by bitsandbytes' three.
    """
    if _has_kernel(packed, state):
        second = state.state2
        return operators.four_bits(
            packed,
            state.absmax,
            state.code,
            (second.code, second.absmax, state.offset) if state.nested else (),
            blocksize=state.blocksize,
            shape=state.shape,
            dtype=dtype,
        )
    scale = state.absmax
    if state.nested:
        scale = dequantize_blockwise(scale, state.state2).add_(state.offset)
    # bitsandbytes' own function gives the dtype that was quantised; its products have that of the activations.
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        packed.view(-1, 1), scale, state.blocksize, state.quant_type, state.shape, dtype
    )


def serve_backward(layer: nn.Linear, on: bool) -> None:
    """Say whether what forward dequantises of this layer's weight is kept for backward, in training mode."""
    layer._serves_backward = on


def serves_backward(layer: nn.Linear) -> bool:
    """Whether it is; of a layer that was never told, no."""
    return layer.training and getattr(layer, "_serves_backward", False)


def product(layer: nn.Linear, x: Tensor, out: Tensor | None = None, *, weight: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias in x's dtype, without gradient; x (T, in), returns (T, out), in `out` if that is given.

    weight: what `weight_of` gives, where the caller has it.
    """
    weight, bias = (weight_of(layer, x.dtype) if weight is None else weight).t(), layer.bias
    if bias is None:
        return torch.mm(x, weight, out=out)
    if isinstance(layer, Linear8bitLt):  # rounded before the bias is added, as int8.py does
        return torch.mm(x, weight, out=out).add_(bias.to(x.dtype))
    return torch.addmm(bias.to(x.dtype), x, weight, out=out)


class Product(torch.autograd.Function):
    """`product` for x of any shape (…, in), with d x = grad W. Keeps nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        kept = weight_of(layer, x.dtype) if ctx.needs_input_grad[0] and serves_backward(layer) else None
        ctx.save_for_backward(kept)
        ctx.layer = layer
        # A buffer of the final shape, not a view of one: some models write to what comes out.
        result = x.new_empty(*x.shape[:-1], layer.out_features)
        product(layer, x.flatten(0, -2), result.flatten(0, -2), weight=kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return grad @ (weight_of(ctx.layer, grad.dtype) if kept is None else kept), None


def _has_kernel(packed: Tensor, state: QuantState) -> bool:
    if state.quant_type != "nf4" or not operators.four_bits_at_hand(packed):
        return False
    return state.state2.blocksize == 256 if state.nested else state.absmax.dtype == torch.float32


def _from_int8(layer: Linear8bitLt, dtype: torch.dtype) -> Tensor:
    # Multiplied in fp32 and rounded once, into a buffer of the final dtype: no fp32 weight in between on CUDA.
    weight = layer.weight.detach()
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return torch.mul(weight, scale[:, None] / 127, out=torch.empty(weight.shape, dtype=dtype, device=weight.device))
