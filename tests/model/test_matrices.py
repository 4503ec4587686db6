"""Layers that compute through a Matrix: as they did, in any dtype; in eight bits, as what their codes stand for."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lite.errors import ModelError
from lite.model import matrices
from lite.model.head import head_of
from lite.optim import blocks

IDS = torch.tensor([[5, 9, 9, 30, 7, 100]])


def test_linears_are_the_blocks_alone(tiny_model):
    names = list(matrices.linears(tiny_model("llama")))
    assert len(names) == 4 * 7
    assert all(name.startswith("model.layers.") for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fed_linear_gives_the_plain_ones_values(dtype: torch.dtype, bias: bool):
    torch.manual_seed(0)
    layer, x = nn.Linear(9, 14, bias=bias, dtype=dtype), torch.randn(2, 3, 9, dtype=dtype)
    plain = layer(x)
    assert matrices.matrix_of(layer) is None
    matrix = matrices.feed(layer)
    assert matrices.matrix_of(layer) is matrix
    assert matrix.weight is layer.weight
    torch.testing.assert_close(layer(x), plain)
    assert layer(x).shape == (2, 3, 14)


def test_a_fed_embedding_scales_its_rows_as_gemmas_does(tiny_model):
    model = tiny_model("gemma3")
    embedding = model.get_input_embeddings()
    plain = embedding(IDS)
    assert not torch.equal(plain, nn.functional.embedding(IDS, embedding.weight))  # scaled by √64
    matrices.feed(embedding)
    assert torch.equal(embedding(IDS), plain)


def test_eight_bits_compute_as_the_dequantised_weights(tiny_model):
    model = tiny_model("llama")
    twin = copy.deepcopy(model)
    assert matrices.to_eight_bits(model, torch.device("cpu")) == 4 * 7
    for name, layer in matrices.linears(twin).items():
        codes, scale = blocks.quantised(layer.weight.data)
        layer.weight.data = blocks.dequantised(codes, scale, torch.float32)
        assert torch.equal(model.get_submodule(name).weight, codes)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    assert torch.equal(model.lm_head.weight, twin.lm_head.weight)
    saved = model.state_dict()
    assert saved["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert saved["model.layers.0.mlp.up_proj.weight_scale"].shape == (96 * 64 // 128,)


def test_what_is_quantised_is_not_quantised_again(tiny_model):
    model = tiny_model("llama")
    matrices.to_eight_bits(model, torch.device("cpu"))
    with pytest.raises(ModelError, match="quantised already"):
        matrices.to_eight_bits(model, torch.device("cpu"))


def test_other_layers_than_linear_ones_are_not_called_quantised(tiny_model):
    model = tiny_model("llama")
    for name, layer in matrices.linears(model).items():
        model.set_submodule(name, Conv1D(layer.out_features, layer.in_features))
    with pytest.raises(ModelError, match=r"no plain linear layer.*Conv1D.*Train an adapter"):
        matrices.to_eight_bits(model, torch.device("cpu"))


def test_the_head_gives_its_gradient_to_its_matrix(tiny_model):
    model = tiny_model("llama")
    assert head_of(model).take is None
    matrix = matrices.feed(model.lm_head)
    head_of(model).take(torch.ones(2, 211), torch.ones(2, 64))
    assert torch.equal(matrix.gradient, torch.full((64, 211), 2.0))
