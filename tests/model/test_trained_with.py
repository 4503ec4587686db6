"""The record of what weights were trained with: what counts as another, and what does not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lite.errors import ExportError
from lite.model import trained_with
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
