"""What is written beside the weights: above all, every token that ends an answer."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lite.errors import ExportError
from lite.merge import companions
from lite.merge.source import Source, source_of
from lite.model import trained_with

END, OTHER = 258, 256  # <|im_end|> and <|endoftext|> in the tiny model


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return shutil.copytree(tiny / "model", tmp_path / "model")


def change(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def opened(model: Path, **config: object) -> Source:
    change(model / "config.json", **config)
    return source_of(model)


def test_all_that_ends_an_answer_is_named(model: Path) -> None:
    """The template's end of a turn, then what the generation config says, then config.json: each once."""
    change(model / "generation_config.json", eos_token_id=OTHER)
    assert companions.stop_tokens(opened(model, eos_token_id=[OTHER, 7])) == [END, OTHER, 7]


def test_what_was_trained_with_is_all(model: Path) -> None:
    """config.json's own stop token is none of a run that trained without it."""
    change(model / "generation_config.json", eos_token_id=[END])
    trained_with.write(model)
    assert companions.stop_tokens(opened(model, eos_token_id=OTHER)) == [END]


def test_nothing_says_how_it_stops(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    (model / "generation_config.json").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ExportError, match=r"nothing says which token ends an answer. Name it as eos_token_id in gen"):
        companions.stop_tokens(opened(model, eos_token_id=None))


def test_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ExportError, match="the tokenizer cannot be loaded"):
        companions.stop_tokens(opened(model))


def test_generation_settings_are_kept(model: Path, tmp_path: Path) -> None:
    """But for the mark by which a loader would take config.json's stop tokens over the file's."""
    change(model / "generation_config.json", _from_model_config=True, temperature=0.7, eos_token_id=None)
    made = companions.generation_config(opened(model))
    assert made.items() >= {"temperature": 0.7, "eos_token_id": [END]}.items()
    assert "_from_model_config" not in made


def test_the_bases_settings_where_an_adapter_came_without(model: Path, tmp_path: Path) -> None:
    change(model / "generation_config.json", temperature=0.7)
    files = tmp_path / "files"
    files.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(model / name, files / name)
    made = companions.generation_config(replace(opened(model), files=files))
    assert (made["temperature"], made["eos_token_id"]) == (0.7, [END])


def test_files_are_copied_byte_for_byte(model: Path, tmp_path: Path) -> None:
    """Templates by name and the model's own code too; weights and what else lies there are not."""
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}", encoding="utf-8")
    (model / "modeling_own.py").write_text("code", encoding="utf-8")
    to = tmp_path / "to"
    to.mkdir()
    source = opened(model)
    companions.write(source, to)
    left = {str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()}
    assert left == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
        "additional_chat_templates/tool_use.jinja", "trained_with.json",
    }  # fmt: skip
    for name in left - {"generation_config.json", "trained_with.json"}:
        assert (to / name).read_bytes() == (model / name).read_bytes()
    trained_with.require_same(to)
    assert trained_with.read(to).stop_tokens == [END]

    again = tmp_path / "again"
    again.mkdir()
    companions.write(opened(model, auto_map={"AutoModelForCausalLM": "modeling_own.Own"}), again)
    assert (again / "modeling_own.py").read_text(encoding="utf-8") == "code"


def test_the_bases_processors(model: Path, tmp_path: Path) -> None:
    """Training leaves none. The base's template for them is the model's where it has no other, and is left out else."""
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
        (model / name).write_text('{"chat_template": "of the base"}', encoding="utf-8")
    files = tmp_path / "files"
    files.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copyfile(model / name, files / name)
    (files / "processor_config.json").write_text("{}", encoding="utf-8")
    for to, others in (("one", set()), ("other", {"chat_template.json"})):
        (tmp_path / to).mkdir()
        companions.write(replace(opened(model), files=files), tmp_path / to)
        left = {path.name for path in (tmp_path / to).iterdir()} - {path.name for path in files.iterdir()}
        assert left == {"preprocessor_config.json", "trained_with.json", *others}
        assert (tmp_path / to / "processor_config.json").read_text(encoding="utf-8") == "{}"
        (files / "chat_template.jinja").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"eos_token_id": [', "cannot be read"),
        ("[1]", r"a list\. Expected a JSON object"),
        ('{"eos_token_id": "2"}', r"eos_token_id = '2'\. Expected the id of a token, or a list of ids"),
        ('{"eos_token_id": [2, null]}', r"eos_token_id = \[2, None\]"),
    ],
)
def test_a_generation_config_that_is_none(model: Path, tmp_path: Path, content: str, told: str) -> None:
    source = opened(model)
    (model / "generation_config.json").write_text(content, encoding="utf-8")
    for ask in (companions.stop_tokens, companions.generation_config, trained_with_record):
        with pytest.raises(ExportError, match=rf"generation_config\.json: {told}"):
            ask(source)


def trained_with_record(source: Source) -> None:
    trained_with.record_of(source.files)


def test_named_templates_without_a_default(model: Path) -> None:
    """Which is meant is not known: what else is named ends an answer."""
    (model / "chat_template.jinja").unlink()
    change(model / "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "{{ messages }}"}])
    change(model / "generation_config.json", eos_token_id=OTHER)
    assert companions.stop_tokens(opened(model, eos_token_id=7)) == [OTHER, 7]
