"""Adapters: what they are put on, what is saved, and that what does not fit is refused by name."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lite.errors import ModelError
from lite.model import adapters, load
from lite.recipe import Recipe
from tests.model.tiny import ARCHITECTURES, DENSE, tiny_model

Folder = Callable[[str], Path]
LLAMA_LIKE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TARGETS = dict.fromkeys(DENSE, LLAMA_LIKE) | {
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "qwen3-moe": {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    },  # its experts are 3-D parameters, its router is never adapted
}


def attached(recipe: Recipe) -> PeftModel:
    return adapters.attach(load.load_model(recipe), recipe)


def trained(model: PeftModel) -> PeftModel:
    """As if some steps had been made: B is zero at first."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def saved(model_folder: Folder, tmp_path: Path) -> Path:
    """A run folder with an adapter of rank 4, trained, on qwen3."""
    recipe = Recipe(model=str(model_folder("qwen3")), dtype="float32", lora_r=4, lora_alpha=8)
    adapters.save(trained(attached(recipe)), tmp_path / "run" / "adapter")
    return tmp_path / "run"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_layer_of_the_blocks_is_adapted_and_nothing_else(model_folder: Folder, architecture: str):
    model = attached(Recipe(model=str(model_folder(architecture))))
    assert set(model.peft_config["default"].target_modules) == TARGETS[architecture]
    names = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in names} == TARGETS[architecture]
    assert len(names) == 2 * len(TARGETS[architecture])
    assert all(".layers." in name for name in names)


@pytest.mark.parametrize("quantisation", ["none", "4bit", "8bit"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_and_a_round_trip_through_plain_peft(
    model_folder: Folder, architecture: str, quantisation: str, ids: torch.Tensor, tmp_path: Path
):
    """Every adapter weight gets a finite gradient; peft by itself reads what is saved and computes the same."""
    if architecture == "qwen3-moe" and quantisation != "none":
        pytest.skip("experts cannot be quantised: test_load.py")
    recipe = Recipe(
        model=str(model_folder(architecture)),
        dtype="float32",
        load_in_4bit=quantisation == "4bit",
        load_in_8bit=quantisation == "8bit",
    )
    model = trained(attached(recipe))
    model(ids).logits.float().logsumexp(-1).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)
    adapters.save(model, tmp_path)
    again = attached(recipe.model_copy(update={"adapter": str(tmp_path)}))
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    plain = PeftModel.from_pretrained(load.load_model(recipe), str(tmp_path))
    torch.testing.assert_close(plain(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.1}], ids=str)
@pytest.mark.parametrize("four_bit", [False, True])
def test_variants_train_and_load_again(
    model_folder: Folder, settings: dict[str, bool], four_bit: bool, ids: torch.Tensor, tmp_path: Path
):
    base = {"model": str(model_folder("qwen3")), "dtype": "bfloat16", "load_in_4bit": four_bit}
    model = trained(attached(Recipe(**base, **settings)))
    model.train()(ids).logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
    adapters.save(model, tmp_path)
    again = attached(Recipe(**base, adapter=str(tmp_path)))
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_the_start_depends_on_the_seed_alone(model_folder: Folder):
    def start(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed)  # whatever the generator was used for before
        model = attached(Recipe(model=str(model_folder("qwen3")), seed=seed))
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    one, same, other = start(1), start(1), start(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if "lora_A" in name)


def test_a_new_adapter_changes_nothing_yet(model_folder: Folder, ids: torch.Tensor):
    recipe = Recipe(model=str(model_folder("qwen3")), dtype="float32")
    base = load.load_model(recipe)(ids).logits
    assert torch.equal(attached(recipe)(ids).logits, base)


def test_asked_layers_only(model_folder: Folder):
    model = attached(Recipe(model=str(model_folder("qwen3")), lora_target_modules="q_proj, layers.1.mlp.up_proj"))
    adapted = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.removeprefix("base_model.model.model.layers.") for name in adapted} == {
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "1.mlp.up_proj",
    }


def test_layers_that_do_not_exist_are_named_with_those_that_do(model_folder: Folder):
    with pytest.raises(ModelError) as caught:
        attached(Recipe(model=str(model_folder("phi3")), lora_target_modules="q_proj,o_proj,embed_tokens,"))
    assert str(caught.value).splitlines() == [
        "lora_target_modules:",
        "  q_proj: no such linear layer",
        "  embed_tokens: no such linear layer",
        "  '': no such linear layer",
        "Expected all-linear, or names out of: down_proj, gate_up_proj, lm_head, o_proj, qkv_proj.",
    ]


def test_the_head_is_adapted_where_it_is_asked_for(model_folder: Folder, tmp_path: Path, ids: torch.Tensor):
    base = {"model": str(model_folder("qwen3")), "dtype": "float32"}
    model = trained(attached(Recipe(**base, lora_target_modules="lm_head,q_proj")))
    assert model.peft_config["default"].target_modules == {"lm_head", "q_proj"}
    adapters.save(model, tmp_path)
    assert torch.equal(attached(Recipe(**base, adapter=str(tmp_path)))(ids).logits, model(ids).logits)


@pytest.mark.parametrize("inner", [None, "layer", "wg"])  # itself, or within as in JetMoE and HunYuan
def test_a_router_that_is_a_linear_layer_is_not_adapted(inner: str | None):
    """peft's own "all-linear" would adapt it."""
    model = tiny_model("qwen3")
    for layer in model.model.layers:
        layer.mlp.gate = nn.ModuleDict({inner: nn.Linear(128, 4)}) if inner else nn.Linear(128, 4)
    assert set(adapters.target_names(model, "all-linear")) == LLAMA_LIKE


def test_names_are_written_out_where_a_short_one_would_reach_elsewhere():
    model = tiny_model("qwen3")
    model.tower = nn.Module()
    model.tower.q_proj = nn.Linear(8, 8)
    names = adapters.target_names(model, "q_proj")
    assert names == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


def test_what_is_saved_is_what_any_peft_user_expects(saved: Path, model_folder: Folder):
    config = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_folder("qwen3"))
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["task_type"]) == (4, 8, "LORA", "CAUSAL_LM")
    assert config["inference_mode"] is True
    assert config["target_modules"] == sorted(LLAMA_LIKE)
    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * len(LLAMA_LIKE)
    assert tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (4, 128)
    assert sorted(path.name for path in (saved / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_going_on_from_a_run_takes_its_settings_and_weights(saved: Path, model_folder: Folder, ids: torch.Tensor):
    recipe = Recipe(model=str(model_folder("qwen3")), dtype="float32", run=str(saved))
    settled = adapters.settle(recipe)
    assert (settled.lora_r, settled.lora_alpha, settled.lora_target_modules) == (4, 8.0, ",".join(sorted(LLAMA_LIKE)))
    assert adapters.settle(settled) == settled  # so the saved recipe reruns
    model = attached(settled)
    expected = trained(attached(Recipe(model=str(model_folder("qwen3")), dtype="float32", lora_r=4, lora_alpha=8)))
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_settings_that_contradict_the_saved_adapter_are_named_together(saved: Path, model_folder: Folder):
    recipe = Recipe(
        model=str(model_folder("qwen3")), adapter=str(saved / "adapter"), lora_r=8, use_dora=True, lora_alpha=8
    )
    with pytest.raises(ModelError) as caught:
        attached(recipe)
    assert str(caught.value).splitlines()[1:] == [
        "  lora_r = 8, but the adapter has 4",
        "  use_dora = True, but the adapter has False",
        "Leave these settings out.",
    ]


def test_an_adapter_of_another_model_is_refused_before_the_model_is_touched(saved: Path):
    """Hidden 64 instead of 128, one layer instead of two: every layer that does not fit is named once with its size."""
    other = tiny_model("qwen3", hidden_size=64, num_hidden_layers=1)
    with pytest.raises(ModelError) as caught:
        adapters.attach(other, Recipe(adapter=str(saved / "adapter")))
    message = str(caught.value)
    assert "model.layers.0.mlp.up_proj: lora_A is (4, 128), but the layer has 64 in" in message
    assert "model.layers.1.mlp.up_proj: the model has no such layer" in message
    assert not any("lora_" in name for name, _ in other.named_parameters())


def test_whole_modules_are_trained_in_fp32_only(model_folder: Folder, tmp_path: Path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapters.save(get_peft_model(tiny_model("qwen3"), config), tmp_path)
    base = {"model": str(model_folder("qwen3")), "adapter": str(tmp_path)}
    assert attached(Recipe(**base, dtype="float32")).get_output_embeddings().weight.requires_grad
    with pytest.raises(ModelError, match=r"lm_head.*bfloat16\nTrain with --dtype float32"):
        attached(Recipe(**base, dtype="bfloat16"))


def test_another_base_of_the_same_shape_is_warned_of(saved: Path, caplog: pytest.LogCaptureFixture):
    model = tiny_model("qwen3")
    with caplog.at_level(logging.WARNING):
        adapters.attach(model, Recipe(adapter=str(saved / "adapter")))
    assert "was trained on" in caplog.text


def test_loading_is_strict_and_all_or_nothing(saved: Path, model_folder: Folder):
    """One tensor missing, one too many, one of another shape: all three are named, and no weight has changed."""
    file = saved / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    missing, misshapen = sorted(tensors)[0], sorted(tensors)[1]
    del tensors[missing]
    tensors[misshapen] = torch.zeros(3, 3)
    tensors["base_model.model.extra.lora_A.weight"] = torch.zeros(1)
    save_file(tensors, file)
    model = attached(Recipe(model=str(model_folder("qwen3")), lora_r=4))
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ModelError) as caught:
        adapters.load(model, saved / "adapter")
    message = str(caught.value)
    assert f"{missing}: missing in the file, the model has (4, 256)" in message
    assert f"{misshapen}: (3, 3) in the file, the model's is (128, 4)" in message
    assert "base_model.model.extra.lora_A.weight: (1,) in the file, the model has no such tensor" in message
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("live", [torch.bfloat16, torch.float32])
def test_loading_keeps_the_live_dtype(saved: Path, model_folder: Folder, live: torch.dtype):
    model = attached(Recipe(model=str(model_folder("qwen3")), lora_r=4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(live)
    adapters.load(model, saved / "adapter")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {live}


def test_saving_twice_gives_the_same_bytes(saved: Path, model_folder: Folder, tmp_path: Path):
    model = attached(Recipe(model=str(model_folder("qwen3")), dtype="float32", run=str(saved)))
    adapters.save(model, tmp_path / "again")
    for file in (saved / "adapter").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_folder_without_an_adapter_is_named(tmp_path: Path):
    with pytest.raises(ModelError) as caught:
        adapters.continued_from(Recipe(run=str(tmp_path)))
    message = str(caught.value)
    assert message.startswith(f"run = {str(tmp_path)!r}: no adapter to go on from:")
    assert "adapter_config.json: no such file" in message
    assert "adapter_model.safetensors: no such file" in message


def test_a_broken_adapter_file_is_named(saved: Path, model_folder: Folder):
    file = saved / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ModelError, match=r"adapter_model.safetensors cannot be read"):
        attached(Recipe(model=str(model_folder("qwen3")), run=str(saved)))
    (saved / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r"')
    with pytest.raises(ModelError, match=r"adapter_config.json cannot be read"):
        adapters.settle(Recipe(run=str(saved)))


@pytest.mark.parametrize("four_bit", [False, True])
def test_the_share_of_trained_weights(model_folder: Folder, four_bit: bool):
    """qwen3 with r = 4: 2 layers of 4 · (in + out): q 192, k 160, v 160, o 192, gate, up and down 384 each.

    A quantised weight counts as one, though two are stored in a byte.
    """
    recipe = Recipe(model=str(model_folder("qwen3")), lora_r=4, load_in_4bit=four_bit)
    trainable = 2 * 4 * (192 + 160 + 160 + 192 + 3 * 384)
    total = sum(p.numel() for p in tiny_model("qwen3").parameters()) + trainable
    assert adapters.trainable(attached(recipe)) == f"{100 * trainable / total:.2g} % of weights trained"
