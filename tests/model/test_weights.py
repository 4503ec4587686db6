"""Where weights lie: all on the device but the first layers, with the scales that bitsandbytes keeps beside them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lite.memory.checkpoint import checkpoint_layers
from lite.memory.meter import frozen_tensors
from lite.memory.stream import stream_layers
from lite.model import adapters, load
from lite.model.layers import decoder_layers
from lite.model.weights import move_but_first
from lite.recipe import Recipe


def recipe_of(folder: Path, bits: int) -> Recipe:
    quantised = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8}
    return Recipe(model=str(folder), dtype="bfloat16", device="cpu", lora_r=2, **quantised)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_all_but_the_first_layers_move(model_folder: Callable[[str], Path], bits: int):
    model = load.load_model(recipe_of(model_folder("qwen3"), bits))
    move_but_first(model, torch.device("meta"), 1)
    staying, moved = decoder_layers(model).values()
    assert {tensor.device.type for tensor in frozen_tensors(staying)} == {"cpu"}
    assert {tensor.device.type for tensor in frozen_tensors(moved)} == {"meta"}
    here = {id(tensor) for tensor in frozen_tensors(staying)}
    assert {t.device.type for t in frozen_tensors(model) if id(t) not in here} == {"meta"}
    weight = moved.mlp.up_proj.weight
    assert type(weight) is type(staying.mlp.up_proj.weight)
    assert bits != 4 or weight.quant_state is moved.mlp.up_proj.quant_state


@pytest.mark.parametrize("bits", [4, 16])
def test_a_model_of_two_places_computes_the_same_once_it_streams(
    model_folder: Callable[[str], Path], ids: torch.Tensor, bits: int
):
    recipe = recipe_of(model_folder("qwen3"), bits)
    plain = adapters.attach(load.load_model(recipe), recipe)
    model = adapters.attach(load.load_model(recipe, host_layers=2), recipe)
    checkpoint_layers(model)
    stream_layers(model, 2)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_on_a_gpu(model_folder: Callable[[str], Path], ids: torch.Tensor, bits: int):
    """The first layers are on the host until they stream, and the model then computes what one loaded whole does."""
    recipe = recipe_of(model_folder("qwen3"), bits).model_copy(update={"device": "cuda"})
    plain = adapters.attach(load.load_model(recipe), recipe)
    model = adapters.attach(load.load_model(recipe, host_layers=1), recipe)
    assert not model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.is_cuda
    checkpoint_layers(model)
    stream_layers(model, 1)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    with torch.no_grad():
        # Quantised by the CPU: the same codes but for ties, so equal up to rounding.
        there = plain.eval()(ids.cuda()).logits
        torch.testing.assert_close(model.eval()(ids.cuda()).logits, there, rtol=2e-2, atol=2e-2)
