"""Whole weights in files: what is written is read by transformers and by us, in pieces, strictly, or not at all."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lite.errors import ExportError, ModelError
from lite.memory.embedding import host_embedding
from lite.memory.meter import Meter
from lite.model import shards, whole_files
from lite.optim import blocks
from lite.optim.matrix import Matrix
from lite.reference.weights import tensors_digest

IDS = torch.arange(3, 30)[None]
BF16 = torch.bfloat16


def base(tiny_model, folder: Path, architecture: str, *, dtype: torch.dtype = BF16, **changes: object):
    """A saved base in bf16, loaded in `dtype` as lite loads it, with all its weights moved since."""
    tiny_model(architecture, dtype=BF16, **changes).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model.eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def read(folder: Path, **settings: object) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True, **settings)
    assert not any(report.values()), report
    return model.eval()


def tensors() -> dict[str, Tensor]:
    """Of every dtype that a trained model has, some larger than a chunk of rows in the files."""
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randint(1, 256, (70, 65_536), generator=generator, dtype=torch.uint8),
        "a.weight_scale": torch.rand(70 * 512, generator=generator),
        "a.weight.pending": torch.randn(4, 96, generator=generator),
        "b.weight": nn.Parameter(torch.randn(33, 96, generator=generator).bfloat16()),
        "norm.weight": nn.Parameter(torch.tensor([1.0, float("nan")], dtype=torch.float64)),
        "scalar": torch.tensor(2.5),
    }


def bits(one: Tensor) -> Tensor:
    return one.detach().reshape(-1).view(torch.uint8)


@contextmanager
def files_of(size_bytes: int) -> Iterator[None]:
    """No file can be longer: what a full disk is like."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_transformers_loads_what_was_written(tiny_model, tmp_path: Path, architecture: str, tied: bool) -> None:
    """The same logits bit for bit; names, dtype and all settings are as transformers itself has them in its files."""
    model = base(tiny_model, tmp_path / "base", architecture, tie_word_embeddings=tied)
    written = []
    whole_files.write_model(model, tmp_path / "model", written.append)
    again = read(tmp_path / "model")
    assert torch.equal(logits(again), logits(model))
    assert again.dtype == BF16
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "base"))
    assert {name: one.shape for name, one in mine.items()} == {name: one.shape for name, one in theirs.items()}
    assert {one.dtype for one in mine.values()} == {BF16}
    assert ("lm_head.weight" in mine) != tied
    assert sum(written) == whole_files.weight_bytes(model) == sum(one.nbytes for one in mine.values())
    own, before = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "base"))
    assert own == before
    assert again.config.use_cache


def test_fp32_is_written_as_fp32(tiny_model, tmp_path: Path) -> None:
    """Of bf16 files: an update of a thousandth of a weight would be lost again."""
    model = base(tiny_model, tmp_path / "base", "llama", dtype=torch.float32)
    whole_files.write_model(model, tmp_path / "model")
    again = read(tmp_path / "model")
    assert again.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("waiting", [False, True])
def test_codes_become_plain_weights(tiny_model, tmp_path: Path, waiting: bool) -> None:
    """Values (code − 128) / 127 · scale of 128 in a row, plus P A where updates wait, rounded once to bf16."""
    model = base(tiny_model, tmp_path / "base", "llama")
    module = model.model.layers[1].mlp.up_proj  # (96, 64)
    codes, scale = blocks.quantised(module.weight.detach())
    expected = (codes.view(-1, 128).float() - 128) / 127 * scale[:, None]
    module.weight = nn.Parameter(codes, requires_grad=False)
    module.register_buffer("weight_scale", scale)
    module.matrix = Matrix(module.weight, module.weight_scale)
    plain = model.model.layers[0].mlp.down_proj  # (64, 96), in bf16
    plain.matrix = Matrix(plain.weight)
    other = plain.weight.detach().float()
    if waiting:
        generator = torch.Generator().manual_seed(1)
        for matrix in (module.matrix, plain.matrix):
            matrix.basis = torch.linalg.qr(torch.randn(64, 4, generator=generator))[0]
            matrix.pending = torch.randn(4, 96, generator=generator) * 0.1
        expected = expected.view(96, 64) + (module.matrix.basis @ module.matrix.pending).t()
        other = other + plain.matrix.basis @ plain.matrix.pending
    whole_files.write_model(model, tmp_path / "model")
    read(tmp_path / "model")
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert not any("scale" in name for name in found)
    for name, exact in (("1.mlp.up_proj", expected.view(96, 64)), ("0.mlp.down_proj", other)):
        mine = found[f"model.layers.{name}.weight"]
        assert mine.dtype == BF16
        torch.testing.assert_close(mine.float(), exact, rtol=2**-8, atol=1e-6)


def test_an_embedding_on_the_host_is_written_too(tiny_model, tmp_path: Path) -> None:
    model = base(tiny_model, tmp_path / "base", "qwen3", tie_word_embeddings=False)
    expected = logits(model)
    model.requires_grad_(False)
    host_embedding(model)
    whole_files.write_model(model, tmp_path / "model")
    assert torch.equal(logits(read(tmp_path / "model")), expected)


def test_a_head_that_is_tied_no_longer_has_its_own_tensor(tiny_model, tmp_path: Path) -> None:
    model = base(tiny_model, tmp_path / "base", "gemma3")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    whole_files.write_model(model, tmp_path / "model")
    assert torch.equal(logits(read(tmp_path / "model")), logits(model))


def test_a_models_own_code_goes_along(tiny_model, tmp_path: Path) -> None:
    model = base(tiny_model, tmp_path / "base", "llama")
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    settings |= {"auto_map": {"AutoConfig": "own.Config"}, "quantization_config": None}
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "base" / "own.py").write_text("from transformers import LlamaConfig as Config\n")
    whole_files.write_model(model, tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["auto_map"] == settings["auto_map"]
    assert "quantization_config" not in written
    assert (tmp_path / "model" / "own.py").read_text() == (tmp_path / "base" / "own.py").read_text()


def test_a_model_whose_base_is_gone(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.use_cache = False
    whole_files.write_model(model, tmp_path)
    again = read(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.config.use_cache
    assert again.config.architectures == ["LlamaForCausalLM"]


def test_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    """In place, and of a parameter that asks for gradients; the digest knows one bit from another."""
    trained = tensors()
    whole_files.save(trained, tmp_path / "weights")
    digest = tensors_digest(*whole_files.content(trained))
    blank = {name: torch.zeros_like(one) for name, one in trained.items()}
    blank["b.weight"] = nn.Parameter(blank["b.weight"].detach())
    places = {name: one.data_ptr() for name, one in blank.items()}
    assert tensors_digest(*whole_files.content(blank)) != digest
    whole_files.load(blank, tmp_path / "weights")
    assert tensors_digest(*whole_files.content(blank)) == digest
    assert places == {name: one.data_ptr() for name, one in blank.items()}
    assert all(torch.equal(bits(blank[name]), bits(trained[name])) for name in trained)


def test_loaded_from_several_files(tmp_path: Path) -> None:
    trained = tensors()
    live = {name: whole_files.Live(one, one.dtype) for name, one in trained.items()}
    assert len(shards.write_exactly(tmp_path, whole_files.Named(live), shard_bytes=1000)) > 2
    blank = {name: torch.zeros_like(one) for name, one in trained.items()}
    whole_files.load(blank, tmp_path)
    assert all(torch.equal(bits(blank[name]), bits(trained[name])) for name in trained)
    (tmp_path / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00005.safetensors: cannot be read: No such file"):
        whole_files.load(blank, tmp_path)


def test_what_does_not_fit_is_told_at_once_and_nothing_is_copied(tmp_path: Path) -> None:
    trained = tensors()
    whole_files.save(trained, tmp_path)
    blank = {name: torch.zeros_like(one) for name, one in trained.items() if name != "scalar"}
    blank |= {"b.weight": torch.zeros(33, 96), "a.weight.pending": torch.zeros(8, 96), "more": torch.zeros(3)}
    with pytest.raises(ModelError) as told:
        whole_files.load(blank, tmp_path)
    for line in (
        "more: missing in the files, the model has (3,) float32",
        "scalar: () float32 in the files, the model has no such tensor",
        "b.weight: (33, 96) bfloat16 in the files, the model's is (33, 96) float32",
        "a.weight.pending: (4, 96) float32 in the files, the model's is (8, 96) float32",
    ):
        assert line in str(told.value)
    assert not any(one.any() for one in blank.values())


@pytest.mark.parametrize(
    ("kept", "told"), [(0.5, "half-written: it has .* bytes, its header tells of"), (0.0, "cut in its header")]
)
def test_a_cut_file(tmp_path: Path, kept: float, told: str) -> None:
    trained = tensors()
    whole_files.save(trained, tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: int(kept * len(content))])
    blank = {name: torch.zeros_like(one) for name, one in trained.items()}
    with pytest.raises(ModelError, match=rf"model.safetensors: {told}"):
        whole_files.load(blank, tmp_path)
    assert not any(one.any() for one in blank.values())


def test_no_room(tiny_model, tmp_path: Path) -> None:
    with files_of(50_000), pytest.raises(OSError, match=r"File too large. They need 4.5 MiB, and .* is free there"):
        whole_files.save(tensors(), tmp_path / "weights")
    with (
        files_of(50_000),
        pytest.raises(ExportError, match=r"File too large. They need .*\n.*the limit on the size of files"),
    ):
        whole_files.write_model(tiny_model("llama"), tmp_path / "model")


def test_a_weight_that_is_not_finite(tiny_model, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[7, 3] = float("nan")
    with pytest.raises(ExportError, match=r"layers\.2\.mlp\.up_proj\.weight, row 7: nan.*diverged"):
        whole_files.write_model(model, tmp_path)


def test_memory_is_some_chunks_of_rows(tiny_model, tmp_path: Path) -> None:
    """Of a model of 64 MiB in fp32 16 MiB of codes: at no time are more than 24 MiB beside it."""
    model = tiny_model("llama", vocab_size=2**18, tie_word_embeddings=True)
    module = model.model.layers[0].mlp.up_proj
    codes = torch.full((2**18, 64), 200, dtype=torch.uint8)
    module.weight = nn.Parameter(codes, requires_grad=False)
    module.register_buffer("weight_scale", torch.full((codes.numel() // 128,), 0.01))
    module.matrix = Matrix(module.weight, module.weight_scale)
    trained = {"embedding": model.model.embed_tokens.weight, "codes": codes}
    tops = []
    for work in (
        lambda: whole_files.write_model(model, tmp_path / "model"),
        lambda: whole_files.save(trained, tmp_path / "weights"),
        lambda: whole_files.load(trained, tmp_path / "weights"),
    ):
        with Meter() as meter:
            meter.hold([*model.parameters(), *model.buffers()], "weights")
            held = meter.live["device"]
            work()
        assert held > 80 * 2**20
        tops.append(meter.top["device"] - held)
    assert min(tops) > 2**20
    assert max(tops) < 24 * 2**20, tops


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "phi3"])
def test_plain_names(tiny_model, tmp_path: Path, architecture: str) -> None:
    whole_files.require_plain_names(tiny_model(architecture).to("meta"))
    whole_files.require_plain_names(base(tiny_model, tmp_path, architecture))


def test_names_that_are_transformers_own(tiny_model, tmp_path: Path) -> None:
    for model in (tiny_model("qwen3-moe").to("meta"), base(tiny_model, tmp_path, "qwen3-moe")):
        with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts\.gate_up_proj \(4, 96, 64\)") as told:
            whole_files.require_plain_names(model)
        assert "experts.0.down_proj.weight" in str(told.value)
