"""Files of tiny models of every architecture: what llama.cpp's converter makes of them, by record_converter.py."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import AutoModelForCausalLM

from lite.errors import ExportError
from lite.gguf import write as writing
from lite.gguf.imatrix import Importance, Weighed
from lite.gguf.llama import running
from lite.gguf.quantise import Quantiser
from lite.gguf.types import FILE_TYPES
from lite.gguf.write import write
from lite.merge.companions import stop_tokens
from lite.merge.merge import merge
from lite.merge.source import Source, source_of
from lite.train.progress import Quiet
from tests.gguf.record_converter import FIXTURE, TYPES, described
from tests.gguf.tiny import MODELS, numbers, read_config, write_model
from tests.merge.tiny_weights import write_adapter

RECORDED = json.loads(gzip.decompress(FIXTURE.read_bytes()))["models"]
# Where ours is not the converter's; test_vocabulary.py says more of the tokenizer.
DIFFERENT = {
    # The converter writes it where tokenizer_config.json does; engines have different defaults. And the chat template
    # here prints no BOS, so that no prompt that was trained has one, though the tokenizer puts it before plain text.
    "tokenizer.ggml.add_bos_token": tuple(MODELS),
    # CodeGemma's end of turn, which the converter gives every Gemma 1; here it is a byte.
    "tokenizer.ggml.eot_token_id": ("gemma",),
}


class Poisoned:
    """Weights, of which one tensor has a number of ours in its last place."""

    def __init__(self, source: Source, name: str, value: float) -> None:
        self.weights, self.name, self.value = source.weights, name, value
        self.shapes, self.dtype = source.weights.shapes, source.weights.dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        rows = self.weights.rows(name, start, stop)
        if name == self.name and stop in (None, self.shapes[name][0]):
            rows.view(-1)[-1] = self.value
        return rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def qwen3(tiny: Path) -> Source:
    return source_of(write_model(tiny / "again", "qwen3"))


def outputs(folder: Path, *names: str) -> dict[Any, Path]:
    return {FILE_TYPES[name]: folder / f"{name}.gguf" for name in names}


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", MODELS)
def test_files_are_the_converters(tiny: Path, tmp_path: Path, name: str) -> None:
    """Names, order, shapes, types and bytes of all tensors; keys, their types and values, but those of DIFFERENT."""
    source = source_of(write_model(tiny, name))
    write(source, outputs(tmp_path, *TYPES), threads=1)
    excepted = {key for key, names in DIFFERENT.items() if name in names}
    for kind in TYPES:
        ours = json.loads(json.dumps(described(tmp_path / f"{kind}.gguf")))
        theirs = RECORDED[name][kind]
        assert ours["tensors"] == theirs["tensors"]
        differing = {
            key
            for key in ours["keys"].keys() | theirs["keys"].keys()
            if ours["keys"].get(key) != theirs["keys"].get(key)
        }
        assert differing == excepted


def test_images_are_left_out_and_said(tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = source_of(write_model(tiny, "gemma3-images"))
    with caplog.at_level("INFO"):
        made = write(source, outputs(tmp_path, "f16"), threads=1)
    assert all("vision" in name or "projector" in name for name in made["left_out"])
    assert "of images" in caplog.text


def test_how_it_is_cut_changes_no_byte(tmp_path: Path, qwen3: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several types in one reading, by one thread, or one type and a few rows at a time, by three."""
    together, apart = tmp_path / "together", tmp_path / "apart"
    made = write(qwen3, outputs(together, "q4_k_m", "q8_0", "bf16"), threads=1)
    monkeypatch.setattr(writing, "CHUNK_ELEMENTS", 500)
    for name in ("q4_k_m", "q8_0", "bf16"):
        write(qwen3, outputs(apart, name), threads=3)
        assert (together / f"{name}.gguf").read_bytes() == (apart / f"{name}.gguf").read_bytes()
    assert made["tensors"] == 25
    assert made["files"]["bf16"]["bytes"] == (together / "bf16.gguf").stat().st_size
    # Rows of 64 and 80 numbers: blocks of 32 take the place of those of 256, and nothing does where 80 is no multiple.
    assert made["files"]["q4_k_m"]["types"] == {"F32": 9, "Q5_0": 12, "Q8_0": 2, "F16": 2}


def test_progress_ends_with_all(tmp_path: Path, qwen3: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    class Watched(Quiet):
        def rows(self, done: int, total: int, unit: str = "rows") -> None:
            told.append((done, total, unit))

    monkeypatch.setattr(writing, "_MIB", 1)
    made = write(qwen3, outputs(tmp_path, "q8_0"), threads=1, progress=Watched())
    total = 4 * made["parameters"]
    assert told[0] == (0, total, "MiB")
    assert told[-1] == (total, total, "MiB")
    assert told == sorted(told)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, qwen3: Source, kind: str, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    poisoned = replace(qwen3, weights=Poisoned(qwen3, name, value))
    told = rf"blk\.1\.ffn_up\.weight \(of {name}\): row 79 holds NaN or infinity.*\n.*no type holds others"
    with pytest.raises(ExportError, match=told):
        write(poisoned, outputs(tmp_path, kind), threads=1)
    assert not list(tmp_path.iterdir())


def test_numbers_beyond_half_precision_are_named(tmp_path: Path, qwen3: Source) -> None:
    """And bf16 holds them; a type that is written beside the one that cannot is not left behind."""
    poisoned = replace(qwen3, weights=Poisoned(qwen3, "model.layers.0.mlp.gate_proj.weight", 70_000.0))
    with pytest.raises(ExportError, match=r"row 79 holds a number too large for F16\.\n.*take bf16"):
        write(poisoned, outputs(tmp_path, "bf16", "f16"), threads=1)
    assert not list(tmp_path.iterdir())
    write(poisoned, outputs(tmp_path, "bf16"), threads=1)
    assert tensors_of(tmp_path / "bf16.gguf")["blk.0.ffn_gate.weight"].tensor_type == Kind.BF16


def test_an_adapter_in_every_type(tmp_path: Path, qwen3: Source) -> None:
    """Where it reaches, rows are float32 on a base in bf16: each type holds them as it would those of an fp32 model."""
    live, stored = "blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight"
    model = AutoModelForCausalLM.from_pretrained(qwen3.files, dtype=torch.bfloat16)
    write_adapter(tmp_path / "adapter", model, target_modules=["q_proj"])
    source = source_of(tmp_path / "adapter", base=qwen3.files)
    truth = source.weights.rows(stored)  # (128, 64)
    assert (truth.dtype, source.weights.dtype(stored)) == (torch.float32, torch.bfloat16)
    merge(tmp_path / "adapter", tmp_path / "merged", base=qwen3.files)
    write(source_of(tmp_path / "merged"), outputs(tmp_path / "merged", "bf16"), threads=1)
    kinds = ("f32", "f16", "bf16", "q8_0")
    write(source, outputs(tmp_path / "together", *kinds), threads=1)
    held = {}
    for kind in kinds:
        write(source, outputs(tmp_path / "alone", kind), threads=1)
        together, alone = (tmp_path / folder / f"{kind}.gguf" for folder in ("together", "alone"))
        assert together.read_bytes() == alone.read_bytes()
        held[kind] = tensors_of(alone)[live].data
    assert np.array_equal(held["f32"], truth.numpy())
    assert np.array_equal(held["f16"], truth.half().numpy())
    assert np.array_equal(held["bf16"], tensors_of(tmp_path / "merged" / "bf16.gguf")[live].data)
    with Quantiser(1) as quantiser:
        assert np.array_equal(held["q8_0"], quantiser.quantise(truth.numpy(), Kind.Q8_0))


@pytest.mark.parametrize("changes", [{"attention_factor": 1.0}, {"mscale": 1.0, "mscale_all_dim": 0.5}])
def test_yarn_of_another_attention_factor(tiny: Path, tmp_path: Path, changes: dict[str, float]) -> None:
    """llama.cpp says what transformers says. Left to itself, it is off by 0.26 and 0.13."""
    folder = write_model(tiny / "factor", "qwen3-yarn", dtype=torch.float32)
    config = read_config(folder)
    config["rope_parameters"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    write(source_of(folder), outputs(tmp_path, "f32"), threads=1)
    ids = [(7 * i * i + 3 * i) % 250 + 5 for i in range(120)]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    with running(tmp_path / "f32.gguf", context=512, parallel=1) as file:
        (found,) = file.next_tokens([ids], 320)
    # Keys and values are kept in fp16.
    torch.testing.assert_close(torch.from_numpy(found.logps), expected[found.ids], atol=2e-3, rtol=0)


def test_it_stops_where_the_chat_template_ends_a_turn(tiny: Path) -> None:
    """As the proof, a merge and a server do, though generation_config.json names another token alone."""
    folder = write_model(tiny / "stops", "llama3")
    turns = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<tool>\n' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(turns)
    source = source_of(folder)
    keys = writing.describe(source)[1].kv_data[0]
    end = next(i for i, token in enumerate(keys["tokenizer.ggml.tokens"].value) if token in ("<tool>", b"<tool>"))
    assert keys["tokenizer.ggml.eot_token_id"].value == end
    assert keys["tokenizer.ggml.eos_token_ids"].value == stop_tokens(source) == [end, 2]


def test_an_interrupt_leaves_what_was_there(tmp_path: Path, qwen3: Source) -> None:
    class Interrupting(Quiet):
        def rows(self, done: int, total: int, unit: str = "rows") -> None:
            if done:
                raise KeyboardInterrupt

    (tmp_path / "q8_0.gguf").write_text("the old one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_MIB", 1)
        with pytest.raises(KeyboardInterrupt):
            write(qwen3, outputs(tmp_path, "f16", "q8_0"), threads=1, progress=Interrupting())
    assert [path.name for path in tmp_path.iterdir()] == ["q8_0.gguf"]
    assert (tmp_path / "q8_0.gguf").read_text() == "the old one"


def test_two_types_need_two_files(tmp_path: Path, qwen3: Source) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ExportError, match="to one file"):
        write(qwen3, {FILE_TYPES["f16"]: path, FILE_TYPES["q8_0"]: path})


@pytest.fixture(scope="module")
def weighed_experts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Importance, Source]:
    """A file of experts, quantised with an importance matrix of which every expert has its own."""
    source = source_of(write_model(tiny, "qwen3moe"))
    name = "blk.0.ffn_up_exps.weight"
    sums = numbers("importance", (12, 64)).square().numpy() + np.float32(0.001)
    importance = Importance({name: Weighed(sums, np.full(12, 7, np.int64))}, chunks=1, chunk_tokens=7)
    path = tmp_path_factory.mktemp("weighed") / "q4_0.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "CHUNK_ELEMENTS", 64 * 50)  # an expert has 32 rows: chunks of one and a half
        write(source, {FILE_TYPES["q4_0"]: path}, importance=importance, importance_name="mine.gguf", threads=1)
    return path, importance, source


def test_each_expert_is_weighed_by_its_own_inputs(weighed_experts: tuple[Path, Importance, Source]) -> None:
    path, importance, source = weighed_experts
    written = tensors_of(path)["blk.0.ffn_up_exps.weight"]
    columns = importance.columns(written.name, (12, 32, 64))
    with Quantiser(1) as quantiser:
        for expert in range(12):
            rows = source.weights.rows(f"model.layers.0.mlp.experts.{expert}.up_proj.weight").float().numpy()
            wanted = quantiser.quantise(rows, Kind.Q4_0, columns[expert])
            assert np.array_equal(written.data[expert], wanted)
            assert not np.array_equal(wanted, quantiser.quantise(rows, Kind.Q4_0))


def test_an_importance_matrix_is_noted(weighed_experts: tuple[Path, Importance, Source]) -> None:
    fields = gguf.GGUFReader(weighed_experts[0]).fields
    assert fields["quantize.imatrix.file"].contents() == "mine.gguf"
    assert fields["quantize.imatrix.entries_count"].contents() == 1


def test_weights_as_fine_as_the_file_are_not_rounded(tiny: Path, tmp_path: Path) -> None:
    """A model stored in fp32 keeps numbers that bf16 has not."""
    folder = write_model(tiny / "fine", "mistral", dtype=torch.float32)
    source = source_of(folder)
    fine = replace(source, weights=Poisoned(source, "lm_head.weight", 1 + 2**-20))
    write(fine, outputs(tmp_path, "f32", "f16"), threads=1)
    assert tensors_of(tmp_path / "f32.gguf")["output.weight"].data[-1, -1] == 1 + 2**-20
    assert tensors_of(tmp_path / "f16.gguf")["output.weight"].data[-1, -1] == 1
