"""Metadata: what a file says of where its model comes from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGMLQuantizationType as Kind

from lite.errors import ExportError
from lite.gguf.file import TensorInfo
from lite.gguf.metadata import add_general, counts
from lite.merge.source import Source, source_of
from tests.gguf.tiny import write_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return source_of(write_model(tmp_path_factory.mktemp("metadata"), "qwen3"))


def general(source: Source) -> dict[str, Any]:
    writer = gguf.GGUFWriter(None, "qwen3")
    add_general(writer, source, [TensorInfo("token_embd.weight", (1000, 2500), Kind.F32)])
    return {name.removeprefix("general."): value.value for name, value in writer.kv_data[0].items()}


def test_a_run_is_named_as_it_is_and_names_its_base(source: Source) -> None:
    """Not by the folder that its tokenizer lies in, which every run calls `adapter`."""
    trained = replace(source, name="polite-answers-v2", adapter=source.files, base_name="Qwen/Qwen3-0.6B")
    found = general(trained)
    assert found["name"] == "Polite Answers v2"
    assert found["version"] == "v2"
    assert found["base_model.0.name"] == "Qwen3 0.6B"
    assert found["base_model.0.organization"] == "Qwen"
    assert found["base_model.0.repo_url"] == "https://huggingface.co/Qwen/Qwen3-0.6B"
    assert found["size_label"] == "2.5M"
    assert "base_model.count" not in general(source)
    assert general(replace(trained, base_name="mine"))["base_model.0.name"] == "Mine"


def test_sampling_settings_travel(source: Source, tmp_path: Path) -> None:
    for path in source.files.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20.0, "top_p": None}))
    found = general(replace(source, name="a-run", files=tmp_path))
    assert found["sampling.temp"] == 0.6
    assert found["sampling.top_k"] == 20
    assert isinstance(found["sampling.top_k"], int)
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": "many"}))
    with pytest.raises(ExportError, match="top_k is 'many'"):
        general(replace(source, name="a-run", files=tmp_path))


@pytest.mark.parametrize(
    ("card", "license_"),
    [
        ("---\nlicense: 4\ntags: [7, chat]\nmodel_name: 2026-01-02\nbase_model: {a: 1}\n---\n", "4"),
        ("---\na: [\n---\n", None),
    ],
)
def test_a_card_that_holds_no_text_or_no_yaml(
    source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture, card: str, license_: str | None
) -> None:
    """What it says is written as text; one that cannot be read is left out with a warning."""
    shutil.copytree(source.files, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(card)
    writer = gguf.GGUFWriter(tmp_path / "keys.gguf", "qwen3")
    add_general(writer, source_of(tmp_path / "model"), [])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = {name: entry.value for name, entry in writer.kv_data[0].items()}
    assert found.get("general.license") == license_
    assert found.get("general.tags") == (["7", "chat"] if license_ else None)
    assert found["general.name"] == ("2026-01-02" if license_ else "Model")
    assert ("its front matter is no YAML" in caplog.text) == (license_ is None)


def test_parameters_are_counted_by_who_uses_them() -> None:
    """Two stacks of four experts of 6 numbers, and 10 that every token meets: 58, of which one expert 12."""
    stack = (4, 2, 3)
    tensors = [
        TensorInfo("blk.0.ffn_up_exps.weight", stack, Kind.F32),
        TensorInfo("blk.0.ffn_down_exps.weight", stack, Kind.F32),
        TensorInfo("blk.0.attn_q.weight", (2, 5), Kind.F32),
    ]
    assert counts(tensors) == (58, 10, 12, 4)
