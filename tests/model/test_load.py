"""Loading tiny models of each architecture: what is quantised, frozen, counted; what a user reads when it fails."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import nn

from lite.errors import ModelError
from lite.model import load, matrices, trained, weights
from lite.model.layers import decoder_layers
from lite.plan import skeleton
from lite.recipe import Recipe
from tests.model.tiny import ARCHITECTURES, DENSE, tiny_model

Folder = Callable[[str], Path]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_the_weights_that_were_saved(model_folder: Folder, architecture: str, ids: torch.Tensor):
    model = load.load_model(Recipe(model=str(model_folder(architecture)), dtype="float32", device="cpu"))
    expected = tiny_model(architecture).eval()
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert model(ids).past_key_values is None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("architecture", DENSE)
def test_quantises_the_blocks_and_nothing_else(model_folder: Folder, architecture: str, bits: int):
    """Each weight is off by what its format costs on normal numbers, and not by nothing.

    int8: steps of max/127 with max ≈ 3.5–4 σ, uniform error step/√12: about 0.009 σ. NF4 in blocks of 64: about 0.09 σ.
    """
    folder = str(model_folder(architecture))
    recipe = Recipe(model=folder, dtype="float32", device="cpu", load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = load.load_model(recipe)
    kind = Linear4bit if bits == 4 else Linear8bitLt
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    inside = {name for name in linear if name.startswith(tuple(f"{layer}." for layer in decoder_layers(model)))}
    assert {name for name, module in linear.items() if isinstance(module, kind)} == inside
    assert model.get_output_embeddings().weight.dtype == torch.float32
    exact = tiny_model(architecture)
    for name in inside:
        weight = exact.get_submodule(name).weight.detach()
        error = (dequantize_module_weight(linear[name]) - weight).norm() / weight.norm()
        assert 0.07 < error < 0.11 if bits == 4 else 0.003 < error < 0.012, name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("architecture", DENSE)
def test_quantised_layers_compute_with_the_dequantised_weights(
    model_folder: Folder, architecture: str, bits: int, ids: torch.Tensor
):
    folder = str(model_folder(architecture))
    model = load.load_model(Recipe(model=folder, dtype="float32", load_in_4bit=bits == 4, load_in_8bit=bits == 8))
    plain = tiny_model(architecture).eval()
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            plain.get_submodule(name).weight.data = dequantize_module_weight(module)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_bytes_of_nf4_by_hand(model_folder: Folder, caplog: pytest.LogCaptureFixture):
    """NF4: half a byte a weight, a byte of scale every 64, a float every 256 scales, two code tables, an offset.

    Two layers of qwen3 hold q 64×128, k and v 32×128, o 128×64 (heads of 16) and three 256×128 matrices.
    """
    matrices = [(64, 128)] * 2 + [(32, 128)] * 2 + [(256, 128)] * 3
    tables = 4 * 16 + 4 * 256 + 4  # codes of NF4 and of its scales, the scales' offset
    scales = [(out * inside // 64) for out, inside in matrices]
    quantised = sum(o * i // 2 for o, i in matrices) + sum(s + 4 * -(-s // 256) + tables for s in scales)
    with caplog.at_level(logging.INFO, logger="lite.model.load"):
        recipe = Recipe(model=str(model_folder("qwen3")), dtype="float32", device="cpu", load_in_4bit=True)
        model = load.load_model(recipe)
    unquantised = sum(p.numel() * 4 for p in model.parameters() if p.dtype == torch.float32)
    rotary = sum(buffer.nbytes for buffer in model.buffers())
    assert weights.weight_bytes(model) == 2 * quantised + unquantised + rotary
    assert f"loaded {model_folder('qwen3')} in nf4: 0.5 MiB" in caplog.text


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_checkpoint_is_loaded_as_it_is(model_folder: Folder, tmp_path: Path, bits: int, ids: torch.Tensor):
    recipe = Recipe(model=str(model_folder("qwen3")), dtype="float32", load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    first = load.load_model(recipe)
    first.save_pretrained(tmp_path)
    plain = Recipe(model=str(tmp_path), dtype="float32")
    asked = Recipe(model=str(tmp_path), dtype="float32", load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    for again in (plain, asked):
        torch.testing.assert_close(load.load_model(again)(ids).logits, first(ids).logits, rtol=1e-5, atol=1e-5)
    other = Recipe(model=str(tmp_path), dtype="float32", load_in_4bit=bits == 8, load_in_8bit=bits == 4)
    with pytest.raises(ModelError, match=rf"is quantised already, as bitsandbytes {bits}-bit"):
        load.load_model(other)


def test_a_quantised_checkpoint_computes_in_the_recipes_dtype(model_folder: Folder, tmp_path: Path):
    load.load_model(Recipe(model=str(model_folder("qwen3")), dtype="bfloat16", load_in_4bit=True)).save_pretrained(
        tmp_path
    )
    model = load.load_model(Recipe(model=str(tmp_path), dtype="float32"))
    assert {m.compute_dtype for m in model.modules() if isinstance(m, Linear4bit)} == {torch.float32}


def test_four_bit_gradients_survive_an_evaluation(model_folder: Folder, ids: torch.Tensor):
    """bitsandbytes repacks weights for inference on CPUs with AVX512-BF16, after which no gradient passes them."""
    model = load.load_model(Recipe(model=str(model_folder("qwen3")), dtype="bfloat16", load_in_4bit=True))

    def gradient() -> torch.Tensor:
        model.train()
        hidden = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=hidden).logits.float().logsumexp(-1).sum().backward()
        return hidden.grad

    before = gradient()
    with torch.no_grad():
        model.eval()(ids)
    assert torch.equal(gradient(), before)


@pytest.mark.parametrize("flag", ["4bit", "8bit"])
def test_experts_that_cannot_be_quantised_are_named_with_their_bytes(model_folder: Folder, flag: str):
    """Of each layer: 4 experts of (2 · 64, 128) and of (128, 64), in bf16: 0.125 and 0.0625 MiB."""
    recipe = Recipe(model=str(model_folder("qwen3-moe")), load_in_4bit=flag == "4bit", load_in_8bit=flag == "8bit")
    with pytest.raises(ModelError) as caught:
        load.load_model(recipe)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"--{flag}: ")
    assert "4 expert tensors" in lines[0]
    assert "0.4 MiB of them would stay bf16" in lines[0]
    assert lines[1].strip() == "model.layers.0.mlp.experts.gate_up_proj (4, 128, 128): 0.1 MiB"


def test_weights_that_the_checkpoint_lacks_are_an_error(model_folder: Folder, tmp_path: Path):
    folder = shutil.copytree(model_folder("qwen3"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.weight: not in the checkpoint"):
        load.load_model(Recipe(model=str(folder)))


def test_weights_of_another_shape_are_an_error(model_folder: Folder, tmp_path: Path):
    folder = shutil.copytree(model_folder("qwen3"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    with pytest.raises(ModelError) as caught:
        load.load_model(Recipe(model=str(folder)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 2 * 3 + 1
    assert lines[1] == "  model.layers.0.mlp.down_proj.weight: (128, 256) in the checkpoint, (128, 512) by config.json"


def test_a_broken_weights_file_is_an_error(model_folder: Folder, tmp_path: Path):
    folder = shutil.copytree(model_folder("qwen3"), tmp_path / "model")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match="its model cannot be loaded"):
        load.load_model(Recipe(model=str(folder)))


def test_what_is_wrong_with_a_folder_is_said_at_once(tmp_path: Path):
    with pytest.raises(ModelError) as caught:
        load.load_model(Recipe(model=str(tmp_path), revision="main"))
    message = str(caught.value)
    assert "revision = 'main' is of a hub name" in message
    assert "there is no config.json in it" in message
    assert "there are no weights in it" in message
    assert "hf download" in message


def test_an_adapter_given_as_a_model_is_recognised(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="It is an adapter: pass it as --adapter"):
        load.load_model(Recipe(model=str(tmp_path)))


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path: Path):
    with pytest.raises(ModelError, match=r"there is no folder .*nowhere"):
        load.load_tokenizer(Recipe(model=str(tmp_path / "nowhere")))


def test_without_a_network_it_says_how_to_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="`hf download someone/model --local-dir FOLDER`"):
        load.load_model(Recipe(model="someone/model"))


def test_code_of_the_repositorys_own_is_not_run_unasked(model_folder: Folder, tmp_path: Path):
    folder = shutil.copytree(model_folder("qwen3"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ModelError, match="pass --trust-remote-code"):
        load.load_model(Recipe(model=str(folder)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_that_is_not_there_is_an_error():
    with pytest.raises(ModelError, match=r"device = 'cuda': .* Or train on the CPU with --device cpu"):
        load.device(Recipe(device="cuda"))


def test_dtype_auto_follows_the_cpu(monkeypatch: pytest.MonkeyPatch):
    for capabilities, dtype in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert load.compute_dtype(Recipe(device="cpu")) == dtype
    assert load.compute_dtype(Recipe(device="cpu", dtype="bfloat16")) == torch.bfloat16


def test_an_older_torch_asks_the_system(monkeypatch: pytest.MonkeyPatch):
    by_torch = load.cpu_multiplies_bf16()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert load.cpu_multiplies_bf16() == by_torch


def test_the_tokenizer_is_the_folders_own(model_folder: Folder):
    tokenizer = load.load_tokenizer(Recipe(model=str(model_folder("qwen3"))))
    assert tokenizer.decode(tokenizer("the model")["input_ids"]) == "the model"


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "llama"])
def test_a_folder_without_a_tokenizer_is_an_error(architecture: str, tmp_path: Path):
    """transformers invents one for some architectures, which turns every text into nothing."""
    tiny_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        load.load_tokenizer(Recipe(model=str(tmp_path)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_bits_while_loading_are_those_of_a_loaded_model(
    model_folder: Folder, dtype: str, ids: torch.Tensor
) -> None:
    """Codes, scales and logits bit for bit; transformers takes the model for a plain one afterwards."""
    folder = str(model_folder("qwen3"))
    found = load.load_model(Recipe(model=folder, dtype=dtype, device="cpu", galore=True, int8_weights=True))
    plain = load.load_model(Recipe(model=folder, dtype=dtype, device="cpu"))
    matrices.to_eight_bits(plain, torch.device("cpu"))
    expected = plain.state_dict()
    assert {name: tensor.dtype for name, tensor in found.state_dict().items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    assert torch.equal(found(ids).logits, plain(ids).logits)
    assert not found.is_quantized
    assert vars(found.config).keys() == vars(plain.config).keys()
    assert not hasattr(found, "hf_quantizer")


def test_weights_of_another_shape_are_an_error_in_eight_bits_too(model_folder: Folder, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("qwen3"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name}: \(255, 128\) in the checkpoint, \(256, 128\) by config.json"):
        load.load_model(Recipe(model=str(folder), device="cpu", galore=True, int8_weights=True))


@pytest.mark.parametrize(
    ("settings", "flag"),
    [({"galore": True}, "--galore"), ({"galore": True, "int8_weights": True}, "--galore"), ({"full": True}, "--full")],
    ids=str,
)
def test_quantised_weights_are_not_trained(model_folder: Folder, tmp_path: Path, settings: dict, flag: str) -> None:
    """Told before weights are loaded (there are none any more), by a plan, and of a live model that says nothing."""
    four_bit = Recipe(model=str(model_folder("qwen3")), dtype="float32", device="cpu", load_in_4bit=True)
    model = load.load_model(four_bit)
    model.save_pretrained(tmp_path)
    recipe = Recipe(model=str(tmp_path), dtype="float32", device="cpu", **settings)
    told = rf"its weights are quantised already, as bitsandbytes.*Take the unquantised model.*leave out {flag}\."
    next(tmp_path.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(ModelError, match=told):
        load.load_model(recipe)
    with pytest.raises(ModelError, match=told):
        skeleton.skeleton(recipe, skeleton.config_of(recipe), torch.float32)
    with pytest.raises(ModelError, match=told):
        trained.attach(model, recipe)
    with pytest.raises(ModelError, match="int8_weights = True: Qwen3ForCausalLM is quantised already"):
        matrices.to_eight_bits(model, torch.device("cpu"))
