"""The llama.cpp adapter: the bytes of llama.cpp's own converter, its products, and its answers in llama.cpp."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lite.bundled
from lite.errors import ExportError
from lite.export import gguf_adapter
from lite.export.order import Order
from lite.gguf.llama import running
from lite.gguf.types import file_type
from lite.gguf.write import write as write_gguf
from lite.merge.source import source_of
from lite.train.progress import Quiet
from tests.export.adapters import ADAPTED, ALPHA, RANK, write_adapter
from tests.export.record_lora import FIXTURE, described
from tests.gguf.tiny import write_model

BUNDLED = Path(lite.bundled.__file__).parent / "model"
LINEAR = ADAPTED["qwen3"]


def export(adapter: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file, and what is said of it; its products have been compared with those that a merge adds."""
    source, order = source_of(adapter), Order(str(adapter), "gguf-adapter")
    names = gguf_adapter.names(source, order)
    folder.mkdir(exist_ok=True)
    report = gguf_adapter.write(source, folder, names, order, Quiet())
    checked = gguf_adapter.check(source, folder, names, order, Quiet())[names[0]]
    assert checked["problems"] == []
    assert "not loaded in llama.cpp" in checked["notes"][0]
    assert [path.name for path in folder.iterdir()] == names
    return folder / names[0], report[names[0]]


@pytest.mark.parametrize("name", ADAPTED)
def test_the_bytes_are_the_converters(name: str, tmp_path: Path) -> None:
    """All keys, and every tensor's name, type, shape and bytes: of queries and keys permuted, fused, of both ends."""
    base = write_model(tmp_path, name)
    path, _ = export(write_adapter(base, tmp_path / "a", ADAPTED[name]), tmp_path / "out")
    ours, theirs = described(path), json.loads(FIXTURE.read_text())[name]
    assert ours["tensors"] == theirs["tensors"]
    assert ours["keys"] | {"general.name": None} == theirs["keys"] | {"general.name": None}


def test_one_alpha_for_every_scale(tmp_path: Path) -> None:
    """Rank-stabilised: alpha/√r = (alpha·√r)/r. Of a rank of its own, B makes up for it: `problems` has compared."""
    base = write_model(tmp_path, "qwen3")
    path, _ = export(write_adapter(base, tmp_path / "rs", LINEAR, use_rslora=True), tmp_path / "out-rs")
    assert described(path)["keys"]["adapter.lora.alpha"] == ALPHA * math.sqrt(RANK)
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 5}}
    path, _ = export(write_adapter(base, tmp_path / "own", LINEAR, **patterns), tmp_path / "out-own")
    assert described(path)["keys"]["adapter.lora.alpha"] == ALPHA
    assert described(path)["tensors"]["blk.0.attn_v.weight.lora_a"][1] == [64, 2]


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    """One byte of one matrix, and an adapter with other targets."""
    base = write_model(tmp_path, "llama3")
    adapter = write_adapter(base, tmp_path / "a", ("q_proj", "k_proj"))
    path, _ = export(adapter, tmp_path / "out")
    content = bytearray(path.read_bytes())
    content[-61] ^= 0x40  # of the exponent
    path.write_bytes(content)
    (problem,) = gguf_adapter.problems(source_of(adapter), path)
    assert "its product differs by" in problem
    other = source_of(write_adapter(base, tmp_path / "b", ("q_proj",)))
    assert "blk.0.attn_k.weight.lora_a: not of this adapter" in gguf_adapter.problems(other, path)


def test_what_has_no_place_in_it_is_refused(tmp_path: Path) -> None:
    """By name, with the way out; and no file is left."""
    base = write_model(tmp_path, "llama3")
    whole = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True),
    )
    whole.save_pretrained(tmp_path / "whole")
    tied = write_adapter(base, tmp_path / "tied", ("q_proj", "embed_tokens"))
    for adapter, words in [
        (tmp_path / "whole", ["DoRA", "lm_head.weight: a tensor trained whole", "--to gguf"]),
        (tied, ["embed_tokens.weight: the head reads the same tensor"]),
        (base, ["has no adapter", "--to gguf"]),
    ]:
        with pytest.raises(ExportError) as refused:
            gguf_adapter.write(source_of(adapter), tmp_path / "out", ["x.gguf"], Order(str(adapter)), Quiet())
        assert all(word in str(refused.value) for word in words)
    assert not (tmp_path / "out").exists()


def test_llama_cpp_answers_as_peft_does(tmp_path: Path) -> None:
    """Base and adapter in llama.cpp against base and adapter in peft, both in float32: one next-token distribution."""
    base = shutil.copytree(BUNDLED, tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter", LINEAR, lora_alpha=4, use_rslora=True)
    path, _ = export(adapter, tmp_path / "out")
    write_gguf(source_of(base), {file_type("f32"): tmp_path / "base.gguf"})
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer(text)["input_ids"] for text in ("Where does the cat live?", "Tell me a story of a king.")]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = _logps(model, prompts)
    tuned = _logps(peft.PeftModel.from_pretrained(model, adapter), prompts)
    vocabulary = plain.shape[1]
    with running(tmp_path / "base.gguf", context=256, parallel=1, threads=1, lora=[path]) as llama:
        found = np.stack([_ordered(answer) for answer in llama.next_tokens(prompts, vocabulary)])
    divergence = (np.exp(tuned) * (tuned - found)).sum(1)  # (prompts,) nats
    moved = (np.exp(tuned) * (tuned - plain)).sum(1)
    assert (moved > 0.01).all()
    assert (np.abs(divergence) < 1e-5).all()


def _logps(model: torch.nn.Module, prompts: list[list[int]]) -> np.ndarray:
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0, -1].float() for prompt in prompts]
    return torch.stack(logits).log_softmax(-1).numpy()  # (prompts, V)


def _ordered(answer: Any) -> np.ndarray:
    logps = np.full(len(answer.ids), -np.inf, np.float64)
    logps[answer.ids] = answer.logps
    return logps
