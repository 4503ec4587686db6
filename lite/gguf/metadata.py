"""Metadata: what a GGUF file says of where its model comes from, and how it is stored.

Names, licence, base models and sampling settings are read from the model's card, config.json and generation config by
the gguf package, as llama.cpp's converter has it do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from math import prod
from pathlib import Path

import gguf

from lite.gguf.file import Stored
from lite.gguf.special_tokens import fitting_name
from lite.gguf.types import FileType
from lite.merge.source import Source


def add_general(writer: gguf.GGUFWriter, source: Source, tensors: Sequence[Stored]) -> None:
    """The `general.` keys but `file_type`."""
    total, shared, expert, experts = counts(tensors)
    found = gguf.Metadata.load(None, source.files, None, total)
    if source.name != source.files.name:
        # A run's: what the gguf package reads out of a folder's name, it shall read out of the run's.
        named = gguf.Metadata.apply_metadata_heuristic(
            gguf.Metadata(), gguf.Metadata.load_model_card(source.files), {}, Path(source.name), total
        )
        sampling = {field.name for field in fields(found) if field.name.startswith("sampling_")}
        found = replace(named, **{name: getattr(found, name) for name in sampling})
    # llama.cpp takes a model for a Phi-3 by its name, and aborts where that is wrong.
    found.name = fitting_name(found.name or source.name, source.files)
    if source.base_name is not None and source.adapter is not None and not found.base_models:
        found.base_models = [_base(source.base_name)]
    if found.size_label is None and total:
        found.size_label = gguf.size_label(total, shared, expert, experts)
    writer.add_type(gguf.GGUFType.MODEL)
    found.set_gguf_meta_model(writer)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


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


def counts(tensors: Sequence[Stored]) -> tuple[int, int, int, int]:
    """Parameters in all, those that every token uses, those of one expert, and the number of experts."""
    total = sum(prod(tensor.shape) for tensor in tensors)
    stacks = [tensor for tensor in tensors if "_exps." in tensor.name]
    expert = sum(prod(stack.shape[1:]) for stack in stacks)
    together = sum(prod(stack.shape) for stack in stacks)
    experts = sum(stack.shape[0] for stack in stacks) // len(stacks) if stacks else 0
    return total, total - together, expert, experts
