"""The record of what weights were trained with: what counts as another, and what does not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lite.errors import ExportError
from lite.model import trained_with
from lite.model.origin import weights_mark
from tests.tiny import TEMPLATE, write_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_model(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The tokenizer of the tiny model, its stop token, and the record of them."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    trained_with.write(tmp_path)
    return tmp_path


def change(path: Path, edit: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_what_was_written_can_be_read_back(folder: Path) -> None:
    """258 is <|im_end|>: 256 bytes and two special tokens come before it."""
    record = trained_with.read(folder)
    assert record == trained_with.record_of(folder)
    assert record.stop_tokens == [258]
    assert len(record.tokenizer) == len(record.chat_template) == 32
    trained_with.require_same(folder)


def test_without_a_record_all_is_well(folder: Path) -> None:
    (folder / trained_with.RECORD).unlink()
    (folder / "chat_template.jinja").write_text("other", encoding="utf-8")
    assert trained_with.read(folder) is None
    trained_with.require_same(folder)


def test_what_does_not_change_a_token_does_not_count(folder: Path) -> None:
    """Another order of keys, what a caller sets for each text, names of classes, older spellings of the same."""
    before = trained_with.record_of(folder)
    change(folder / "tokenizer.json", lambda t: t.update(padding={"length": 8}, truncation={"max_length": 9}))
    change(folder / "tokenizer.json", lambda t: t.update(model=dict(reversed(t["model"].items()))))
    change(
        folder / "tokenizer_config.json",
        lambda c: c.update(tokenizer_class="Another", eos_token={"content": c["eos_token"]}),
    )
    change(folder / "generation_config.json", lambda c: c.update(eos_token_id=258, temperature=0.5))
    (folder / "chat_template.jinja").unlink()
    change(
        folder / "tokenizer_config.json", lambda c: c.update(chat_template=[{"name": "default", "template": TEMPLATE}])
    )
    assert trained_with.record_of(folder) == before
    trained_with.require_same(folder)


def test_merges_are_pairs_in_either_spelling(folder: Path) -> None:
    change(folder / "tokenizer.json", lambda t: t["model"].update(merges=["a b", "c d"]))
    older = trained_with.record_of(folder).tokenizer
    change(folder / "tokenizer.json", lambda t: t["model"].update(merges=[["a", "b"], ["c", "d"]]))
    assert trained_with.record_of(folder).tokenizer == older
    change(folder / "tokenizer.json", lambda t: t["model"].update(merges=[["c", "d"], ["a", "b"]]))
    assert trained_with.record_of(folder).tokenizer != older


@pytest.mark.parametrize(
    ("file", "edit", "named"),
    [
        ("tokenizer.json", lambda t: t["model"]["vocab"].update(a=98, b=97), "tokenizer (tokenizer.json"),
        ("tokenizer.json", lambda t: t["added_tokens"].pop(), "tokenizer (tokenizer.json"),
        ("tokenizer_config.json", lambda c: c.update(add_bos_token=True), "tokenizer (tokenizer.json"),
        ("generation_config.json", lambda c: c.update(eos_token_id=[256, 258]), "stop tokens (eos_token_id in"),
    ],
)  # fmt: skip
def test_another_is_told_by_name(folder: Path, file: str, edit: Callable[[dict], None], named: str) -> None:
    change(folder / file, edit)
    with pytest.raises(ExportError) as caught:
        trained_with.require_same(folder)
    problems = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert len(problems) == 1
    assert named in problems[0]
    assert f"delete {folder / trained_with.RECORD}" in str(caught.value)


def test_all_three_at_once(folder: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ExportError) as caught:
        trained_with.require_same(folder)
    assert str(caught.value).count("here is None") == 2
    assert "here is []" in str(caught.value)


def test_a_tokenizer_of_parts(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    first = trained_with.record_of(tmp_path).tokenizer
    (tmp_path / "merges.txt").write_text("a b", encoding="utf-8")
    assert None is not first != trained_with.record_of(tmp_path).tokenizer


def test_files_that_cannot_be_read(folder: Path) -> None:
    (folder / trained_with.RECORD).write_text("[1]", encoding="utf-8")
    with pytest.raises(ExportError, match=r"a list\. Expected a JSON object"):
        trained_with.require_same(folder)
    (folder / trained_with.RECORD).write_text('{"tokenizer": "a"}', encoding="utf-8")
    with pytest.raises(ExportError, match="expected tokenizer, chat_template, stop_tokens"):
        trained_with.require_same(folder)
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ExportError, match=r"tokenizer.json: cannot be read"):
        trained_with.record_of(folder)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "chat_template is neither a text nor"),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template is neither a text nor"),
        ("tokenizer_config.json", {"eos_token": {"x": 1}}, r"eos_token without content\. Expected a token's text"),
        ("generation_config.json", {"eos_token_id": "258"}, "eos_token_id = '258'. Expected the id of a token"),
        ("generation_config.json", {"eos_token_id": [258, None]}, r"eos_token_id = \[258, None\]"),
    ],
)
def test_what_no_tokenizer_is_made_of(folder: Path, name: str, content: dict, told: str) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ExportError, match=f"{name}: {told}"):
        trained_with.record_of(folder)


def test_a_template_is_found_where_a_tokenizer_finds_it(folder: Path) -> None:
    """Files are added, each of which goes before those of before, but for the one that processors alone read."""
    (folder / "chat_template.jinja").unlink()
    several = [{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "other"}]
    (folder / "additional_chat_templates").mkdir()
    expected = []
    for name, content in (
        ("chat_template.json", '{"chat_template": "of processors"}'),
        ("tokenizer_config.json", None),
        ("chat_template.jinja", "alone"),
        ("additional_chat_templates/default.jinja", "named"),
    ):
        if content is None:
            change(folder / name, lambda settings: settings.update(chat_template=several))
        else:
            (folder / name).write_text(content, encoding="utf-8")
        found = AutoTokenizer.from_pretrained(str(folder)).chat_template
        expected.append(found["default"] if isinstance(found, dict) else found)
        assert trained_with.chat_template(folder) == expected[-1]
    assert expected == [None, "listed", "alone", "named"]
    for name in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
        (folder / name).unlink()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools", encoding="utf-8")
    assert AutoTokenizer.from_pretrained(str(folder)).chat_template == {"tool_use": "tools"}
    assert trained_with.chat_template(folder) is None


def test_the_base_that_was_trained_on(folder: Path, made: Path, tmp_path: Path) -> None:
    """Its mark follows the weights, not the config; what it was quantised from is not another base."""
    trained_with.write(folder, weights_mark(made))
    assert trained_with.read(folder) == trained_with.record_of(folder)
    trained_with.require_base(folder, made)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}", encoding="utf-8")
    (base / "model.safetensors").write_bytes((made / "model.safetensors").read_bytes())
    trained_with.require_base(folder, base)
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(ExportError, match="has other weights than it was trained on"):
        trained_with.require_base(folder, base)
    (base / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}', encoding="utf-8")
    trained_with.require_base(folder, base)
    (base / "model.safetensors").unlink()
    assert weights_mark(base) is None
