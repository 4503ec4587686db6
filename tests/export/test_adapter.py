"""The adapter target: a peft folder that says by itself what it belongs to."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lite.bundled
from lite.errors import ExportError
from lite.export import adapter
from lite.export.order import Order
from lite.merge.source import Source, source_of
from lite.train.progress import Quiet
from tests.export.adapters import write_adapter

BUNDLED = Path(lite.bundled.__file__).parent / "model"


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """An adapter whose base has moved, and which came without a tokenizer."""
    base = Path(shutil.copytree(BUNDLED, tmp_path / "base"))
    folder = write_adapter(base, tmp_path / "trained", ("q_proj", "down_proj"), lora_alpha=4, revision="abc")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "/gone"}))
    return source_of(folder, base=base)


def export(source: Source, folder: Path) -> tuple[Path, dict]:
    order = Order(source.name, "adapter")
    names = adapter.names(source, order)
    folder.mkdir()
    report = adapter.write(source, folder, names, order, Quiet())
    assert adapter.check(source, folder, names, order, Quiet())[names[0]]["problems"] == []
    return folder, report[names[0]]


def test_peft_loads_it_and_its_base_by_name(source: Source, tmp_path: Path) -> None:
    """From the folder alone, as its users do; the model answers as base and first adapter do."""
    folder, report = export(source, tmp_path / "out")
    assert report["base"] == str(source.base)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(source.base, dtype=torch.float32)
    first = peft.PeftModel.from_pretrained(base, source.adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt", return_dict=False)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, first(ids).logits)
    assert json.loads((folder / "trained_with.json").read_text())["stop_tokens"] == [2045, 2046]


def test_a_base_on_the_hub_is_named_so(source: Source, tmp_path: Path) -> None:
    """With the revision that it was trained on, which means nothing to a folder."""
    folder, report = export(replace(source, base_name="org/model"), tmp_path / "out")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/model", "abc")
    local, _ = export(source, tmp_path / "local")
    assert json.loads((local / "adapter_config.json").read_text())["revision"] is None
    assert report["base"] == "org/model"


def test_what_is_not_as_it_was_is_found(source: Source, tmp_path: Path) -> None:
    """Half of the weights, and a chat template that was changed."""
    folder, _ = export(source, tmp_path / "out")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    order = Order(source.name, "adapter")
    (problem,) = adapter.check(source, folder, ["x"], order, Quiet())["x"]["problems"]
    assert "half-written" in problem
    weights.write_bytes(content)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (problem,) = adapter.check(source, folder, ["x"], order, Quiet())["x"]["problems"]
    assert "chat template" in problem


def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    """With the targets that it has."""
    with pytest.raises(ExportError, match=r"has no adapter.*\n.*--to safetensors"):
        adapter.write(source_of(str(BUNDLED)), tmp_path, ["x"], Order("x", "adapter"), Quiet())
