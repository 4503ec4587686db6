"""int8 weights, products in the compute dtype: bitsandbytes' 8-bit layers, with their forward replaced.

bitsandbytes multiplies int8 by int8 and leaves columns with outliers in fp16. Which columns those are depends on every
token of the forward, so the same completion scores otherwise in another pack; on a CPU it does so in evaluation only.
Here the weight is dequantised for each product, as NF4's is: the same numbers in any layout, in training and out of it.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def replace_forward(model: nn.Module) -> int:
    """Let every 8-bit linear of `model` compute as `forward` below; returns how many there are."""
    layers = [module for module in model.modules() if isinstance(module, Linear8bitLt)]
    for layer in layers:
        layer.forward = MethodType(forward, layer)
    return len(layers)


def forward(layer: Linear8bitLt, x: Tensor) -> Tensor:
    """x · (scale/127 · W)ᵀ + bias in x's dtype; x (…, in), W (out, in) int8, scale (out,) fp32. Keeps nothing of x."""
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    result = _Product.apply(x, layer.weight.detach(), scale)
    return result if layer.bias is None else result + layer.bias.to(result.dtype)


class _Product(torch.autograd.Function):
    """A product with a frozen weight, which is dequantised once forward and once backward and kept by neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _dequantised(weight, scale, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return grad @ _dequantised(weight, scale, grad.dtype), None, None


def _dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # Multiplied in fp32 and rounded once, into a buffer of the final dtype: no fp32 weight in between on CUDA.
    return torch.mul(weight, scale[:, None] / 127, out=torch.empty(weight.shape, dtype=dtype, device=weight.device))
