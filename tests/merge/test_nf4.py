"""A base as training in few bits saw it: the bits that the loaded model multiplies by, and those that it saves."""

from pathlib import Path

import pytest
import torch

from lite.errors import ExportError
from lite.merge.checkpoint import Checkpoint
from lite.merge.nf4 import Quantised, linear_layers
from lite.model.frozen import weight_of
from lite.model.load import load_model
from lite.recipe import Recipe
from tests.architectures import tiny_config
from tests.merge.tiny_weights import InMemory, write_base

QUANTISED = ("Linear4bit", "Linear8bitLt")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("architecture", "compute"), [("qwen3", "bfloat16"), ("gemma2", "float32")])
def test_bits_of_the_loaded_model(tmp_path: Path, architecture: str, compute: str, bits: int) -> None:
    """Every tensor, whole and by rows; and the model as transformers saves it reads as the same."""
    config = tiny_config(architecture, num_hidden_layers=2, tie_word_embeddings=architecture == "gemma2")
    write_base(tmp_path / "base", config)
    settings = {"model": str(tmp_path / "base"), "data": "none.jsonl", "device": "cpu", "dtype": compute}
    model = load_model(Recipe(method="orpo", **settings, **{f"load_in_{bits}bit": True}))
    model.save_pretrained(tmp_path / "packed")
    dtype = getattr(torch, compute)
    seen = Quantised(Checkpoint.open(tmp_path / "base"), tmp_path / "base", dtype=dtype, four_bit=bits == 4)
    packed = Checkpoint.open(tmp_path / "packed", dequantised=dtype)
    assert set(packed.shapes) == set(seen.shapes)
    quantised = 0
    for name, shape in seen.shapes.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        linear = type(layer).__name__ in QUANTISED
        expected = weight_of(layer, dtype) if linear else layer.weight
        quantised += linear
        for weights in (seen, packed):
            assert weights.shapes[name] == shape == tuple(expected.shape)
            assert weights.dtype(name) == weights.rows(name).dtype == dtype
            assert torch.equal(weights.rows(name), expected)
            assert torch.equal(weights.rows(name, 3, 17), expected[3:17])
    assert quantised == 2 * 7
    assert len(linear_layers(tmp_path / "base", four_bit=bits == 4)) == quantised


def test_dtypes_that_a_checkpoint_in_four_bits_becomes(tmp_path: Path) -> None:
    """Its own unless told: what it was quantised from."""
    write_base(tmp_path / "base", tiny_config("qwen3", num_hidden_layers=1))
    settings = {"model": str(tmp_path / "base"), "data": "none.jsonl", "device": "cpu", "dtype": "bfloat16"}
    load_model(Recipe(method="orpo", **settings, load_in_4bit=True)).save_pretrained(tmp_path / "packed")
    name = "model.layers.0.mlp.up_proj.weight"
    own = Checkpoint.open(tmp_path / "packed")
    wide = Checkpoint.open(tmp_path / "packed", dequantised=torch.float32)
    assert own.dtype(name) == torch.bfloat16
    assert wide.dtype(name) == torch.float32
    assert torch.equal(wide.rows(name).bfloat16(), own.rows(name))
    assert not torch.equal(wide.rows(name), own.rows(name).float())


def test_a_base_that_lacks_what_was_quantised(tmp_path: Path) -> None:
    write_base(tmp_path / "base", tiny_config("qwen3", num_hidden_layers=1))
    with pytest.raises(ExportError, match=r"layers\.0\.self_attn\.q_proj was trained in 4 bits, but no tensor"):
        Quantised(InMemory({"model.norm.weight": torch.ones(2)}), tmp_path / "base", dtype=torch.bfloat16)
