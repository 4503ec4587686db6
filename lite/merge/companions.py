"""Companions: the files without which weights are no model that answers, written beside them.

Tokenizer and chat template are copied as they are, byte for byte. The generation config is made anew: it names every
token that ends an answer, for a server stops at no other.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lite.data.template import read_template
from lite.errors import DataError, ExportError
from lite.merge.source import Source
from lite.model import trained_with

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    *trained_with.PARTS,
    "chat_template.jinja",
    "chat_template.json",
)
NAMED_TEMPLATES = "additional_chat_templates"
FROM_CONFIG = "_from_model_config"  # a loader would take config.json's stop tokens over those of the file that has it


def write(source: Source, folder: Path) -> None:
    """Write tokenizer, chat template, generation config and trained_with.json; code that the model brings, too."""
    for name in COPIED:
        if (source.files / name).is_file():
            shutil.copyfile(source.files / name, folder / name)
    if (source.files / NAMED_TEMPLATES).is_dir():
        shutil.copytree(source.files / NAMED_TEMPLATES, folder / NAMED_TEMPLATES)
    if source.base is not None and "auto_map" in source.config:
        for path in source.base.glob("*.py"):
            shutil.copyfile(path, folder / path.name)
    text = json.dumps(generation_config(source), indent=2, ensure_ascii=False) + "\n"
    (folder / trained_with.GENERATION).write_text(text, encoding="utf-8")
    trained_with.write(folder)


def generation_config(source: Source) -> dict[str, Any]:
    """The model's own settings of generation, with all its stop tokens as `eos_token_id`."""
    places = [source.files, *([source.base] if source.base else [])]
    path = next(
        (place / trained_with.GENERATION for place in places if (place / trained_with.GENERATION).is_file()), None
    )
    own = json.loads(path.read_text(encoding="utf-8")) if path else {}
    kept = {key: value for key, value in own.items() if key != FROM_CONFIG}
    return kept | {"eos_token_id": stop_tokens(source)}


def stop_tokens(source: Source) -> list[int]:
    """Ids of every token that ends an answer, the end of a turn first.

    Of what lite trained, those of the training data. Of other models, what ends a turn of the chat template, and what
    the generation config, the tokenizer and config.json name.
    """
    path = source.files / trained_with.GENERATION
    own = _ids(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")) if path.is_file() else []
    if (source.files / trained_with.RECORD).is_file() and own:
        return own
    tokenizer = load_tokenizer(source.files)
    try:
        ends = list(read_template(tokenizer).stop_ids)
    except DataError:  # a template without turns, or a tokenizer without an end: of a model that nobody talks to
        ends = []
    found = list(dict.fromkeys([*ends, *own, *_ids(source.config.get("eos_token_id"))]))
    if not found:
        raise ExportError(
            f"{source.files}: nothing says which token ends an answer. Name it as eos_token_id in {path.name}."
        )
    return found


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, which need not hold a model. Raises ExportError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportError(f"{folder}: the tokenizer cannot be loaded: {why}. Expected its files there.") from error
    # Where the files are missing, transformers makes up a tokenizer of special tokens that turns every text into none.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ExportError(f"{folder}: the tokenizer cannot be loaded, for its files are not there. Put them there.")
    return tokenizer


def _ids(value: int | list[int] | None) -> list[int]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]
