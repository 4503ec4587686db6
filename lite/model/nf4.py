"""4-bit weights, products in the compute dtype: bitsandbytes' 4-bit layers, with their forward replaced.

bitsandbytes multiplies small batches by another kernel than large ones, and on a CPU with AVX512-BF16 repacks a weight
for good in the first forward in eval mode, its scales rounded to bf16; no gradient passes through it from then on. Here
the weight is dequantised for each product, as bitsandbytes does in training: bit for bit the same, in any layout.
"""

from types import MethodType

from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from lite.model.frozen import Product, compute_dtype


def replace_forward(model: nn.Module) -> int:
    """Let every 4-bit linear of `model` compute as `forward` below; returns how many there are."""
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.forward = MethodType(forward, layer)
    return len(layers)


def forward(layer: Linear4bit, x: Tensor) -> Tensor:
    """x Wᵀ + bias in the layer's compute dtype, then in x's; x (…, in), W (out, in) NF4. Keeps nothing of x."""
    return Product.apply(x.to(compute_dtype(layer, x)), layer).to(x.dtype)
