"""int8 weights, products in the compute dtype: bitsandbytes' 8-bit layers, with their forward replaced.

bitsandbytes multiplies int8 by int8 and leaves columns with outliers in fp16. Which columns those are depends on every
token of the forward, so the same completion scores otherwise in another pack; on a CPU it does so in evaluation only.
Here the weight is dequantised for each product, as NF4's is: the same numbers in any layout, in training and out of it.
"""

from types import MethodType

from bitsandbytes.nn import Linear8bitLt
from torch import Tensor, nn

from lite.model.frozen import Product


def replace_forward(model: nn.Module) -> int:
    """Let every 8-bit linear of `model` compute as `forward` below; returns how many there are."""
    layers = [module for module in model.modules() if isinstance(module, Linear8bitLt)]
    for layer in layers:
        layer.forward = MethodType(forward, layer)
    return len(layers)


def forward(layer: Linear8bitLt, x: Tensor) -> Tensor:
    """x · (scale/127 · W)ᵀ + bias in x's dtype; x (…, in), W (out, in) int8, scale (out,) fp32. Keeps nothing of x."""
    return Product.apply(x, layer)
