"""8-bit layers: values and gradients by hand, and no dependence on the other tokens of the forward."""

import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import nn

from lite.model import int8


def layer_of(weight: torch.Tensor, bias: torch.Tensor) -> Linear8bitLt:
    layer = Linear8bitLt(weight.shape[1], weight.shape[0], has_fp16_weights=False)
    layer.weight = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    if layer.weight.dtype != torch.int8:
        layer.weight = layer.weight._quantize("cpu")
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def test_by_hand():
    """Rows of largest magnitude 127 and 254 have scales 1 and 2: (127, 1) stays, (254, -4) is 2 · (127, −2).

    x = (1, 2): 127 + 2 + ½ and 254 − 8 − ½; the gradient of their sum is the sum of the rows, (381, −3).
    """
    layer = layer_of(torch.tensor([[127.0, 1.0], [254.0, -4.0]]), torch.tensor([0.5, -0.5]))
    assert int8.replace_forward(nn.Sequential(layer)) == 1
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    result = layer(x)
    result.sum().backward()
    torch.testing.assert_close(result.detach(), torch.tensor([[129.5, 245.5]]), rtol=1e-3, atol=0)
    torch.testing.assert_close(x.grad, torch.tensor([[381.0, -3.0]]), rtol=1e-3, atol=1e-3)


def test_a_token_does_not_depend_on_its_neighbours():
    """bitsandbytes' own forward fails this: an outlier in one token takes its column out of int8 for all."""
    torch.manual_seed(0)
    weight, bias = torch.randn(32, 64), torch.zeros(32)
    ours, theirs = layer_of(weight, bias), layer_of(weight, bias)
    theirs.eval().state.threshold = 6.0
    int8.replace_forward(nn.Sequential(ours))
    token, outlier = torch.randn(1, 64), torch.randn(1, 64)
    outlier[0, 7] = 50.0
    both = torch.cat([token, outlier])
    torch.testing.assert_close(ours(both)[:1], ours(token), rtol=1e-5, atol=1e-5)
    assert (theirs(both)[:1] - theirs(token)).abs().max() > 1e-3


def test_an_outlier_costs_no_precision():
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    layer = layer_of(weight, torch.zeros(32))
    int8.replace_forward(nn.Sequential(layer))
    x = torch.randn(8, 64)
    x[0, 7] = 1000.0
    exact = x @ weight.T
    assert ((layer(x) - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 0.02
