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
from lite.model.trained_with import NAMED_TEMPLATES, json_object

OF_PROCESSOR = "chat_template.json"  # which a processor reads before chat_template.jinja
COPIED = (
    "tokenizer.json",
    trained_with.TOKENIZER_CONFIG,
    "special_tokens_map.json",
    *trained_with.PARTS,
    "chat_template.jinja",
    OF_PROCESSOR,
)
# Of a model that sees or hears; training, which is of text, leaves none beside an adapter.
PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
FROM_CONFIG = "_from_model_config"  # a loader would take config.json's stop tokens over those of the file that has it


def write(source: Source, folder: Path) -> None:
    """Write tokenizer, chat template, generation config and trained_with.json; the model's processors and code, too."""
    for name in COPIED:
        if (source.files / name).is_file():
            shutil.copyfile(source.files / name, folder / name)
    # The base's template would be taken over the one that was trained with.
    own_template = trained_with.chat_template(source.files) is not None
    for name in PROCESSORS if own_template else (*PROCESSORS, OF_PROCESSOR):
        if (path := _first(source, name)) is not None:
            shutil.copyfile(path, folder / name)
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
    path = _first(source, trained_with.GENERATION)
    own = json_object(path) if path else {}
    kept = {key: value for key, value in own.items() if key != FROM_CONFIG}
    return kept | {"eos_token_id": stop_tokens(source)}


def stop_tokens(source: Source) -> list[int]:
    """Ids of every token that ends an answer, the end of a turn first.

    Of what lite trained, those of the training data. Of other models, what ends a turn of the chat template, and what
    the generation config, the tokenizer and config.json name.
    """
    path = source.files / trained_with.GENERATION
    own = trained_with.stop_tokens(json_object(path), path) if path.is_file() else []
    if (source.files / trained_with.RECORD).is_file() and own:
        return own
    tokenizer = load_tokenizer(source.files)
    try:
        ends = list(read_template(tokenizer).stop_ids)
    except DataError:  # a template without turns, or a tokenizer without an end: of a model that nobody talks to
        ends = []
    told = trained_with.stop_tokens(source.config, (source.base or source.files) / "config.json")
    found = list(dict.fromkeys([*ends, *own, *told]))
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


def _first(source: Source, name: str) -> Path | None:
    """The file beside the tokenizer, or else the base's."""
    places = [source.files, *([source.base] if source.base else [])]
    return next((place / name for place in places if (place / name).is_file()), None)
