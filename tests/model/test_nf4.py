"""4-bit layers: bit for bit bitsandbytes' training path, in training and out of it, and nothing kept of the input."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from lite.device import meta_stands_for
from lite.memory.meter import Meter
from lite.model.frozen import from_four_bits
from tests.model.quantised import bytes_of, saved_tensors, stored

CASES = list(itertools.product([torch.float32, torch.bfloat16], [True, False], [True, False]))


def layer_of(dtype: torch.dtype, *, bias: bool = False, nested: bool = True, seed: int = 0) -> Linear4bit:
    torch.manual_seed(seed)
    return stored(nn.Linear(128, 192, bias=bias), "nf4", nested=nested, compute=dtype)


def result_and_gradient(compute, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    result = compute(x)
    result.backward(torch.ones_like(result).cumsum(-1) / 100)
    return result.detach(), x.grad


@pytest.mark.parametrize(("dtype", "bias", "nested"), CASES)
def test_values_and_gradients_are_bitsandbytes_own(dtype: torch.dtype, bias: bool, nested: bool):
    """Of its autograd function, and of a plain product with the dequantised weight."""
    layer = layer_of(dtype, bias=bias, nested=nested)
    x = torch.randn(2, 9, 128).to(dtype)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    ours = result_and_gradient(layer, x)
    layer.support_avx512bf16_for_cpu = False
    theirs = result_and_gradient(lambda x: Linear4bit.forward(layer.train(), x), x)
    plain = result_and_gradient(lambda x: F.linear(x, weight, layer.bias), x)
    for other in (theirs, plain):
        assert torch.equal(ours[0], other[0])
        assert torch.equal(ours[1], other[1])


def test_the_input_is_cast_to_the_compute_dtype_and_the_result_back():
    layer = layer_of(torch.float32)
    x = torch.randn(3, 128).bfloat16()
    (result, gradient), weight = result_and_gradient(layer, x), dequantize_4bit(layer.weight, layer.weight.quant_state)
    assert torch.equal(result, F.linear(x.float(), weight).bfloat16())
    assert gradient.dtype == torch.bfloat16


def test_evaluation_is_training_and_repacks_nothing():
    layer = layer_of(torch.bfloat16)
    layer.support_avx512bf16_for_cpu = True
    before, x = copy.deepcopy(layer.weight.data), torch.randn(1, 128).bfloat16()
    trained, _ = result_and_gradient(layer.train(), x)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), trained)
    assert torch.equal(layer.weight.data, before)


def test_nothing_is_kept():
    layer, x = layer_of(torch.bfloat16), torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    with saved_tensors() as tensors:
        layer(x)
    assert bytes_of(tensors, layer) == 0


def test_on_cuda_a_weight_is_dequantised_by_one_operator():
    """On meta that stands for it; FP4 by bitsandbytes' three."""
    for kind, names in (
        ("nf4", ["lite::four_bits"]),
        ("fp4", ["bitsandbytes::dequantize_blockwise", "aten::add_.Tensor", "bitsandbytes::dequantize_4bit"]),
    ):
        weight = torch.empty(192, 128, dtype=torch.bfloat16, device="meta")
        packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=True)
        with meta_stands_for("cuda"), Meter(trace=True) as meter:
            found = from_four_bits(packed, state, torch.bfloat16)
        assert [name for name, _ in meter.trace if "view" not in name] == names
        assert (found.shape, found.dtype) == (weight.shape, weight.dtype)
        assert meter.parts["dequantised"] == found.nbytes
