"""The catalogue against transformers and against the published counts; names and what is said about wrong ones."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lite.errors import ModelError
from lite.model import catalog
from lite.model.catalog import CATALOG, Shape

# As the model cards state them (safetensors' totals; a tied head once).
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mixtral-8x7b": 46_702_792_704,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini": 3_821_079_552,
    "phi-4-14b": 14_659_507_200,
}


@pytest.mark.parametrize("shape", dict.fromkeys(CATALOG.values()), ids=lambda shape: shape.hub)
def test_parameters_are_those_of_the_model_that_transformers_builds(shape: Shape):
    """Two layers of each: the count is affine in layers, and the layer itself is compared."""
    short = dataclasses.replace(shape, layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(catalog.config(short))
    assert short.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert model.config.get_text_config().head_dim == shape.head_dim or shape.model_type in ("qwen2", "phi3", "granite")


@pytest.mark.parametrize("alias", PUBLISHED)
def test_parameters_are_the_published_ones(alias: str):
    assert CATALOG[alias].parameters == PUBLISHED[alias]


def test_blocks_of_qwen_14b_by_hand():
    """5,120 · (2 · 5,120 + 2 · 1,024) in attention and 3 · 5,120 · 13,824 in the MLP, 48 times: 13.212 B."""
    assert 48 * CATALOG["qwen-14b"].matrix_parameters == 48 * (62_914_560 + 212_336_640) == 13_212_057_600


def test_an_alias_means_its_hub_name_in_any_case():
    assert catalog.resolve("qwen-14b") == catalog.resolve("Qwen2.5-14B") == "Qwen/Qwen2.5-14B-Instruct"
    assert catalog.resolve("llama-8b") == "meta-llama/Llama-3.1-8B-Instruct"
    assert catalog.resolve("someone/model") == "someone/model"
    assert Path(catalog.resolve("bundled")).parts[-2:] == ("bundled", "model")


def test_a_folder_wins_over_an_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen-14b").mkdir()
    assert catalog.resolve("qwen-14b") == "Qwen/Qwen2.5-14B-Instruct"  # nothing in it
    (tmp_path / "qwen-14b" / "config.json").write_text("{}")
    assert catalog.resolve("qwen-14b") == "qwen-14b"


def test_an_unknown_name_gets_the_nearest_and_the_list():
    with pytest.raises(ModelError) as caught:
        catalog.resolve("qwen-14")
    message = str(caught.value)
    assert message.startswith("model = 'qwen-14': no such folder or alias. Did you mean qwen-14b?")
    assert all(alias in message for alias in CATALOG)


def test_the_catalogue_needs_no_torch():
    code = "import lite.model.catalog, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
