"""What a model's weights were trained with, and mean nothing without: its tokenizer, chat template and stop tokens.

The files lie beside the weights, in an adapter's folder or a model's. A record of them, trained_with.json, is written
when training ends and goes along wherever they go; whoever opens the folder compares the two.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from lite.errors import ExportError, raise_collected

RECORD = "trained_with.json"
GENERATION = "generation_config.json"
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
        _read(folder / name) for name in ("tokenizer_config.json", "tokenizer.json", GENERATION)
    )
    stops = generation.get("eos_token_id")
    return Record(
        _tokenizer_digest(folder, tokenizer, settings),
        _digest(text) if (text := chat_template(folder)) is not None else None,
        sorted(stops if isinstance(stops, list) else [] if stops is None else [stops]),
    )


def write(folder: Path) -> None:
    """Write the record of the files in `folder` beside them."""
    text = json.dumps(record_of(folder)._asdict(), indent=1) + "\n"
    (folder / RECORD).write_text(text, encoding="utf-8")


def read(folder: Path) -> Record | None:
    """The record that came with a folder; None of a folder that lite did not write."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return Record(**_read(path))
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


def chat_template(folder: Path) -> str | None:
    """The text of the folder's chat template, wherever it is kept; of several the default one; None without one."""
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = _read(folder / name).get("chat_template")
        if isinstance(found, list):
            found = {one["name"]: one["template"] for one in found}.get("default")
        if found is not None:
            return str(found)
    return None


def _tokenizer_digest(folder: Path, tokenizer: dict[str, Any], settings: dict[str, Any]) -> str | None:
    if not tokenizer:
        parts = {name: (folder / name).read_bytes() for name in PARTS if (folder / name).is_file()}
        found: Any = {name: hashlib.blake2b(content, digest_size=16).hexdigest() for name, content in parts.items()}
    else:
        found = {key: value for key, value in tokenizer.items() if key not in PASSING}
        merges = found.get("model", {}).get("merges")
        if merges:  # older files have "a b" where newer ones have ["a", "b"]
            pairs = [one.split(" ") if isinstance(one, str) else one for one in merges]
            found["model"] = {**found["model"], "merges": pairs}
    if not found:
        return None
    special = {name: settings[name] for name in SWITCHES if settings.get(name) is not None}
    special = {name: value["content"] if isinstance(value, dict) else value for name, value in special.items()}
    return _digest(json.dumps([found, special], sort_keys=True, ensure_ascii=False))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's object; {} where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read: {error}. Expected a JSON object.") from None
    if not isinstance(found, dict):
        raise ExportError(f"{path}: a {type(found).__name__}. Expected a JSON object.")
    return found
