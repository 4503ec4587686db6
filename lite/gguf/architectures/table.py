"""The table of architectures: a model's family is found, its tensors are planned, and nothing of it is left unsaid."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lite.errors import ExportError, raise_collected
from lite.gguf.architectures.architecture import Architecture, Config
from lite.gguf.architectures.gemma import GEMMA, GEMMA2, GEMMA3
from lite.gguf.architectures.llama import LLAMA
from lite.gguf.architectures.phi import PHI3
from lite.gguf.architectures.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from lite.gguf.planned import Piece, Planned
from lite.model.shards import Weights
from lite.spellings import nearest

ARCHITECTURES = (LLAMA, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE, GEMMA, GEMMA2, GEMMA3, PHI3)
# Buffers that older checkpoints hold; what they say is in config.json too.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attention\.masked_bias|attention\.bias)$")
_BARE = re.compile(r"^(?=(embed_tokens|layers|norm)\.)")
_IMAGES = re.compile(r"(^|\.)(vision_tower|multi_modal_projector|vision_model)\.")


@dataclass(frozen=True)
class Plan:
    """A model's tensors, as a file will have them."""

    architecture: Architecture
    config: Config
    tensors: tuple[Planned, ...]  # in the order of the checkpoint, those that it does not hold first
    left_out: Mapping[str, str]  # a tensor of the checkpoint → why it is not in the file


def find(config: Mapping[str, Any]) -> tuple[Architecture, Config]:
    """The family of a model, and its config.json with every default filled in, its text's settings on top.

    Raises ExportError for a model that none of them is, and for settings that llama.cpp does not follow.
    """
    known = {name: architecture for architecture in ARCHITECTURES for name in architecture.classes}
    named = next(iter(config.get("architectures") or ()), None)
    if named not in known:
        near = nearest(str(named), list(known))
        raise ExportError(
            f"config.json names the architecture {named!r}, which is not written as GGUF here."
            + (f" The nearest that is: {near}." if near else "")
            + f"\nKnown: {', '.join(known)}.\n"
            "Export to safetensors, and convert with llama.cpp's own convert_hf_to_gguf.py, which knows more."
        )
    architecture, whole = known[named], _filled(config)
    raise_collected(
        ExportError,
        f"This {architecture.name} model asks for what llama.cpp does not do: its file would answer otherwise.",
        list(architecture.refuses(whole)),
        "Serve it by another engine (`lite export --to safetensors`), or train from a model without it.",
    )
    return architecture, whole


def plan(config: Mapping[str, Any], weights: Weights) -> Plan:
    """Every tensor of the file, each made of rows of the checkpoint, each of which is used or knowingly left out.

    Raises ExportError listing every tensor that is missing, of another shape than config.json says, or unknown.
    """
    architecture, whole = find(config)
    shapes = weights.shapes
    spelled = _spelling(frozenset(shapes))  # a name as a plain text model has it → the checkpoint's
    tensors = list(architecture.tensors(whole, frozenset(spelled)))
    left_out = _left_out(shapes, architecture, whole, spelled)
    if not architecture.own_head:
        tensors = [tensor for tensor in tensors if tensor.name != "output.weight"]
    tensors = [_respelled(tensor, spelled) for tensor in tensors]
    _check(tensors, shapes, left_out)
    place = {name: number for number, name in enumerate(shapes)}
    # Experts are written when the last of them is read, as llama.cpp's converter does.
    tensors.sort(key=lambda tensor: max((place[piece.tensor] for piece in tensor.pieces), default=-1))
    return Plan(architecture, whole, tuple(tensors), left_out)


def _filled(config: Mapping[str, Any]) -> Config:
    """config.json as transformers reads it: defaults of its class filled in, older spellings brought up to date."""
    from transformers import CONFIG_MAPPING

    try:
        filled = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
    except Exception as error:  # whatever the checks of a config's class raise
        raise ExportError(
            f"config.json is none that transformers reads: {type(error).__name__}: {error}.\n"
            "Expected the config.json that the model was saved with: take it from there."
        ) from error
    return {**filled, **filled["text_config"]} if "text_config" in filled else filled


def _spelling(names: frozenset[str]) -> dict[str, str]:
    """By what name the checkpoint holds each tensor of a text model.

    Those of models with images wrap it, and a model that was saved without its head has no `model.` before its names.
    """
    return {
        _BARE.sub("model.", name)
        .replace("model.language_model.", "model.")
        .replace("language_model.model.", "model.")
        .replace("language_model.lm_head", "lm_head"): name
        for name in names
    }


def _respelled(tensor: Planned, spelled: Mapping[str, str]) -> Planned:
    return replace(
        tensor,
        pieces=tuple(replace(piece, tensor=spelled.get(piece.tensor, piece.tensor)) for piece in tensor.pieces),
    )


def _left_out(
    shapes: Mapping[str, tuple[int, ...]], architecture: Architecture, config: Config, spelled: Mapping[str, str]
) -> dict[str, str]:
    found = {name: "a buffer that config.json stands for" for name in shapes if _BUFFERS.search(name)}
    if "vision_config" in config:
        found |= {name: "of images, which a file of text leaves out" for name in shapes if _IMAGES.search(name)}
    if not architecture.own_head and "lm_head.weight" in spelled:
        if not config["tie_word_embeddings"]:
            raise ExportError(
                f"This model has a head that is not its embedding (tie_word_embeddings is false), and llama.cpp's "
                f"{architecture.name} has none of its own.\nServe it by another engine, or train with the head tied."
            )
        found[spelled["lm_head.weight"]] = "the head, which is the embedding"
    return found


def _check(tensors: list[Planned], shapes: Mapping[str, tuple[int, ...]], left_out: Mapping[str, str]) -> None:
    pieces: dict[str, Piece] = {piece.tensor: piece for tensor in tensors for piece in tensor.pieces}
    problems = [
        f"{name} is missing; expected {list(piece.shape)}" for name, piece in pieces.items() if name not in shapes
    ]
    problems += [
        f"{name} is of shape {list(shapes[name])}; config.json asks for {list(piece.shape)}"
        for name, piece in pieces.items()
        if name in shapes and tuple(shapes[name]) != piece.shape
    ]
    problems += [
        f"{name} {list(shape)} is in the weights, and no tensor of the file is made of it"
        for name, shape in shapes.items()
        if name not in pieces and name not in left_out
    ]
    raise_collected(
        ExportError,
        "The weights are not what config.json describes:",
        problems,
        "Expected the config.json and the weights of one model: take both from where it was saved.",
    )
