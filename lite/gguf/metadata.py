"""Metadata: what a GGUF file says of where its model comes from, and how it is stored.

Names, licence, base models and sampling settings are read from the model's card, config.json and generation config by
the gguf package, as llama.cpp's converter has it do.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from math import prod
from pathlib import Path
from typing import Any

import gguf

from lite.errors import ExportError
from lite.gguf.file import TensorInfo
from lite.gguf.special_tokens import fitting_name
from lite.gguf.types import FileType
from lite.merge.source import Source

log = logging.getLogger(__name__)

_SAMPLING = "sampling_"
_WHOLE = ("top_k", "penalty_last_n", "mirostat")


def add_general(writer: gguf.GGUFWriter, source: Source, tensors: Sequence[TensorInfo]) -> None:
    """The `general.` keys but `file_type`."""
    total, shared, expert, experts = counts(tensors)
    # What the gguf package reads out of a folder's name, it shall read out of the run's, if it is one.
    own = source.name == source.files.name
    found = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(),
        _card(source.files),
        gguf.Metadata.load_hf_parameters(source.files) if own else {},
        source.files if own else Path(source.name),
        total,
    )
    found = replace(found, **_texts(found), **_sampling(source.files))
    # llama.cpp takes a model for a Phi-3 by its name, and aborts where that is wrong.
    found.name = fitting_name(found.name or source.name, source.files)
    if source.base_name is not None and source.adapter is not None and not found.base_models:
        found.base_models = [_base(source.base_name)]
    if found.size_label is None and total:
        found.size_label = gguf.size_label(total, shared, expert, experts)
    writer.add_type(gguf.GGUFType.MODEL)
    found.set_gguf_meta_model(writer)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _card(files: Path) -> dict[str, Any]:
    """The front matter of the model's card; nothing, and a warning, if it cannot be read."""
    try:
        return gguf.Metadata.load_model_card(files)
    except Exception as error:  # whatever its YAML makes the parser raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        log.warning("%s: its front matter is no YAML (%s); nothing of it is in the file", files / "README.md", first)
        return {}


def _texts(found: gguf.Metadata) -> dict[str, Any]:
    """What stands in the card, numbers and dates as text: YAML makes some of `license: 4` and `tags: [7]`."""
    values = ((field.name, getattr(found, field.name)) for field in fields(found))
    return {
        name: [
            {key: str(text) for key, text in entry.items()} if isinstance(entry, dict) else str(entry)
            for entry in value
        ]
        if isinstance(value, list)
        else str(value)
        for name, value in values
        if value is not None and not name.startswith(_SAMPLING)
    }


def _sampling(files: Path) -> dict[str, Any]:
    """The settings of generation_config.json by which an answer is drawn. Raises ExportError for what is no number."""
    settings, found = gguf.Metadata.load_generation_config(files), {}
    for field in fields(gguf.Metadata):
        key = field.name.removeprefix(_SAMPLING).replace("temp", "temperature")
        value = settings.get(key) if field.name.startswith(_SAMPLING) else None
        if value is None:
            continue
        if key == "sequence":
            found[field.name] = str(value)
        elif isinstance(value, int | float):
            found[field.name] = int(value) if key in _WHOLE else float(value)
        else:
            raise ExportError(f"{files / 'generation_config.json'}: {key} is {value!r}. Expected a number, or nothing.")
    return found


def _base(name: str) -> dict[str, str]:
    """A base model, as the gguf package lists one; `name` as the hub has it, or a folder's."""
    organization, _, own = name.rpartition("/")
    titled = {"name": gguf.Metadata.id_to_title(own)}
    if not organization:
        return titled
    hub = {"organization": gguf.Metadata.id_to_title(organization), "repo_url": f"https://huggingface.co/{name}"}
    return titled | hub


def add_file_type(writer: gguf.GGUFWriter, file_type: FileType) -> None:
    """`general.file_type`."""
    writer.add_file_type(file_type.value)


def add_importance(writer: gguf.GGUFWriter, keys: Mapping[str, str | int]) -> None:
    """What llama-quantize notes of an importance matrix: `Importance.keys`."""
    for name, value in keys.items():
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)


def counts(tensors: Sequence[TensorInfo]) -> tuple[int, int, int, int]:
    """Parameters in all, those that every token uses, those of one expert, and the number of experts."""
    total = sum(prod(tensor.shape) for tensor in tensors)
    stacks = [tensor for tensor in tensors if "_exps." in tensor.name]
    expert = sum(prod(stack.shape[1:]) for stack in stacks)
    together = sum(prod(stack.shape) for stack in stacks)
    experts = sum(stack.shape[0] for stack in stacks) // len(stacks) if stacks else 0
    return total, total - together, expert, experts
