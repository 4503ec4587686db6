"""What a model's weights were trained with, and mean nothing without: its tokenizer, chat template and stop tokens.

The files lie beside the weights, in an adapter's folder or a model's. A record of them, trained_with.json, is written
when training ends and goes along wherever they go; whoever opens the folder compares the two. An adapter's record has
a mark of its base's weights too.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lite.errors import ExportError, raise_collected
from lite.model.origin import weights_mark

RECORD = "trained_with.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
NAMED_TEMPLATES = "additional_chat_templates"
BASE = "base"  # in the record: origin.weights_mark of what an adapter was trained on
# Without a tokenizer.json, of which files a tokenizer is made.
PARTS = ("tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
# Of tokenizer_config.json, what changes a text's ids beside tokenizer.json.
SWITCHES = ("add_bos_token", "add_eos_token", "bos_token", "eos_token", "unk_token")
# Of tokenizer.json, what a caller sets anew for each text.
PASSING = ("version", "truncation", "padding")


class Record(NamedTuple):
    """All three, so that two folders that mean the same by token ids have equal ones."""

    tokenizer: str | None  # digest of vocabulary, merges, added and special tokens, normaliser and pre-tokenizer
    chat_template: str | None  # digest of its text; None without one
    stop_tokens: list[int]  # ids, sorted


def record_of(folder: Path) -> Record:
    """The record of the files as they lie in `folder`; the order of keys and the version that wrote them do not count.

    Raises ExportError naming each file that is no JSON.
    """
    settings, tokenizer, generation = (
        _read(folder / name) for name in (TOKENIZER_CONFIG, "tokenizer.json", GENERATION)
    )
    return Record(
        _tokenizer_digest(folder, tokenizer, settings),
        _digest(text) if (text := chat_template(folder)) is not None else None,
        sorted(stop_tokens(generation, folder / GENERATION)),
    )


def write(folder: Path, base: str | None = None) -> None:
    """Write the record of the files in `folder` beside them. base: the mark of what an adapter was trained on."""
    record = record_of(folder)._asdict() | ({BASE: base} if base else {})
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Record | None:
    """The record that came with a folder; None of a folder that lite did not write."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return Record(**{key: value for key, value in _read(path).items() if key != BASE})
    except TypeError:
        raise ExportError(
            f"{path}: expected {', '.join(Record._fields)}. Delete it to go on without knowing what was trained with."
        ) from None


def require_same(folder: Path) -> None:
    """Raise ExportError naming each of the three that is not as in the folder's record; without one all is well."""
    recorded = read(folder)
    if recorded is None:
        return
    here = record_of(folder)
    files = {"tokenizer": "tokenizer.json, tokenizer_config.json", "chat_template": "chat_template.jinja"}
    files["stop_tokens"] = f"eos_token_id in {GENERATION}"
    raise_collected(
        ExportError,
        f"{folder}: these are not what the weights were trained with:",
        [
            f"{name.replace('_', ' ')} ({files[name]}): {RECORD} has {was}, here is {now}"
            for name, was, now in zip(Record._fields, recorded, here, strict=True)
            if was != now
        ],
        "The model would be asked in other tokens than it learned, or not stop. Put the files back as training left "
        f"them; if the change is meant, delete {folder / RECORD}.",
    )


def require_base(folder: Path, base: Path) -> None:
    """Raise ExportError if the weights in `base` are not those that the adapter in `folder` was trained on.

    All is well where that is not known, and where one of the two is quantised: what it was made from is no other base.
    """
    told, here = _read(folder / RECORD).get(BASE), weights_mark(base)
    if not isinstance(told, str) or here is None or told == here or told.split(":")[0] != here.split(":")[0]:
        return
    raise ExportError(
        f"{folder}: the adapter belongs to another base: {base} has other weights than it was trained on, though "
        "they may be of the same shapes.\nExpected the base that adapter_config.json names as base_model_name_or_path: "
        "say where it lies by --base DIR. If these are the same\nweights stored in another way, delete "
        f'"{BASE}" from {folder / RECORD}.'
    )


def stop_tokens(settings: Mapping[str, Any], path: Path) -> list[int]:
    """The ids in `eos_token_id` of a config: one, several or none. Raises ExportError, naming its path, for others."""
    value = settings.get("eos_token_id")
    ids = list(value) if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int for one in ids):
        raise ExportError(f"{path}: eos_token_id = {value!r}. Expected the id of a token, or a list of ids.")
    return ids


def chat_template(folder: Path) -> str | None:
    """The text of the folder's chat template, where transformers 5.24's tokenizers find it; of several the default one.

    None without one. Files go before tokenizer_config.json; chat_template.json is read by processors alone.
    """
    named = folder / NAMED_TEMPLATES
    for alone in (named / "default.jinja", folder / "chat_template.jinja"):
        if alone.is_file():
            return alone.read_text(encoding="utf-8")
    found = None if any(named.glob("*.jinja")) else _read(folder / TOKENIZER_CONFIG).get("chat_template")
    try:
        if isinstance(found, list):
            found = {one["name"]: one["template"] for one in found}
        if isinstance(found, dict):
            found = found.get("default")
        if found is None or isinstance(found, str):
            return found
    except (KeyError, TypeError):
        pass
    raise ExportError(
        f"{folder / TOKENIZER_CONFIG}: chat_template is neither a text nor a list of names and templates, each "
        '{"name": …, "template": …}. Put it back as the model came with it.'
    )


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ExportError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read: {error}. Expected a JSON object.") from None
    if not isinstance(found, dict):
        raise ExportError(f"{path}: a {type(found).__name__}. Expected a JSON object.")
    return found


def _tokenizer_digest(folder: Path, tokenizer: dict[str, Any], settings: dict[str, Any]) -> str | None:
    if not tokenizer:
        parts = {name: (folder / name).read_bytes() for name in PARTS if (folder / name).is_file()}
        found: Any = {name: hashlib.blake2b(content, digest_size=16).hexdigest() for name, content in parts.items()}
    else:
        found = {key: value for key, value in tokenizer.items() if key not in PASSING}
        model = found.get("model")
        if isinstance(model, dict) and model.get("merges"):  # older files have "a b" where newer ones have ["a", "b"]
            pairs = [one.split(" ") if isinstance(one, str) else one for one in model["merges"]]
            found["model"] = {**model, "merges": pairs}
    if not found:
        return None
    special = {name: settings[name] for name in SWITCHES if settings.get(name) is not None}
    if broken := [name for name, value in special.items() if isinstance(value, dict) and "content" not in value]:
        raise ExportError(f"{folder / TOKENIZER_CONFIG}: {', '.join(broken)} without content. Expected a token's text.")
    special = {name: value["content"] if isinstance(value, dict) else value for name, value in special.items()}
    return _digest(json.dumps([found, special], sort_keys=True, ensure_ascii=False))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    return json_object(path) if path.is_file() else {}
