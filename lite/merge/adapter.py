"""Adapter: a peft LoRA folder, as what it does to each tensor of its base.

Every setting that decides the numbers is honoured or refused by name, and so is every tensor of the file: a merged
model that silently lacks a part of what was trained looks just like one that was trained badly.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite.errors import ExportError, raise_collected
from lite.merge.update import Update
from lite.model.stored import Stored, safetensors_file
from lite.model.trained_with import json_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# How an adapter began decides nothing, unless peft took it out of the base's weights.
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Settings that are honoured, or that decide nothing about the finished numbers. Any other that is on is refused.
KNOWN = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "bias",
    "use_rslora", "use_dora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "trainable_token_indices", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "lora_bias", "ensure_weight_tying", "megatron_core", "qalora_group_size",
}  # fmt: skip
_NAME = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"lora_(?P<matrix>[AB])\.(?P<of>weight|bias)|lora_embedding_(?P<embedding>[AB])|"
    r"(?P<magnitude>lora_magnitude_vector)(?:\.weight)?|token_adapter\.(?P<tokens>trainable_tokens_delta)|"
    r"(?:base_layer\.|modules_to_save\.)?(?P<whole>weight|bias))"
)


@dataclass(frozen=True)
class Adapter:
    """What was trained on top of a base."""

    folder: Path
    config: Mapping[str, Any]  # adapter_config.json
    updates: Mapping[str, Update]  # by the name of the live model's parameter: model.layers.0.mlp.up_proj.weight

    @property
    def ties(self) -> bool:
        """Whether what was done to the embedding was done to a tied head too."""
        return bool(self.config.get("ensure_weight_tying"))

    @classmethod
    def open(cls, folder: Path) -> "Adapter":
        """The adapter in `folder`, its header read and checked; nothing of it is in memory.

        Raises ExportError naming all settings and tensors that cannot be merged.
        """
        folder = Path(folder).expanduser()
        config = _config(folder)
        problems = _refused(config)
        found, wrong = safetensors_file(folder / WEIGHTS)
        problems += wrong
        fields: dict[str, dict[str, Any]] = {}
        for name, stored in found.items():
            match = _NAME.fullmatch(name.removeprefix(PREFIX))
            if match is None or not name.startswith(PREFIX):
                problems.append(f"{name} {stored.shape}: no tensor of LoRA that is known here")
            else:
                problems += _add(fields, match, stored, config)
        if not found and not problems:
            problems.append(f"{WEIGHTS} is empty")
        raise_collected(ExportError, f"{folder}: this adapter cannot be merged:", problems)
        return cls(folder, config, {name: Update(**parts) for name, parts in fields.items()})


def _config(folder: Path) -> dict[str, Any]:
    missing = [f"{name}: no such file" for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing and (folder / "adapter_model.bin").is_file():
        missing.append("adapter_model.bin is there: load it with peft and save it anew with `save_pretrained`")
    raise_collected(ExportError, f"{folder}: no adapter:", missing, "Expected a LoRA adapter as peft saves it.")
    config = json_object(folder / CONFIG)
    try:
        for name in ("r", "lora_alpha"):
            float(config[name])
        for name in ("rank_pattern", "alpha_pattern"):
            for key, value in (config.get(name) or {}).items():
                re.compile(key)
                float(value)
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise ExportError(f"{folder / CONFIG}: {name} cannot be read: {error!r}. Expected what peft saves.") from None
    return config


def _refused(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type = {config.get('peft_type')!r}. Expected 'LORA'")
    start = config.get("init_lora_weights")
    if start not in HARMLESS_STARTS:
        problems.append(
            f"init_lora_weights = {start!r}: peft takes it out of the base's weights whenever it is loaded. Save it as "
            "plain LoRA: `model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion=…)`"
        )
    problems += [
        f"{name} = {value!r}: not known here"
        for name, value in config.items()
        if name not in KNOWN and value and value != "none"
    ]
    return problems


def _add(fields: dict[str, dict[str, Any]], match: re.Match, stored: Stored, config: Mapping[str, Any]) -> list[str]:
    """Note one tensor of the file as a field of the update that it belongs to; returns what is wrong with it."""
    module = match["module"]
    kind = match["of"] or match["whole"] or "weight"
    update = fields.setdefault(f"{module}.{kind}", {})
    if match["matrix"] and kind == "bias":
        rank = _matching(config.get("rank_pattern"), module, config["r"])
        update |= {"bias": stored, "scale": _scale(config, module, rank)}
    elif letter := match["matrix"] or match["embedding"]:
        rank = stored.shape[0 if letter == "A" else -1] if len(stored.shape) == 2 else 0
        if not rank:
            return [f"{module}: lora_{letter} is {stored.shape}. Expected a matrix: it was saved in parts"]
        update |= {letter.lower(): stored, "scale": _scale(config, module, rank)}
        update["of_embedding"] = match["embedding"] is not None
        if config.get("use_dora") and match["embedding"] == "A":
            return [f"{module}: DoRA on an embedding, whose lengths are those of columns, is not merged here"]
    elif match["magnitude"]:
        update["magnitude"] = stored
    elif match["tokens"]:
        indices = config.get("trainable_token_indices")
        if isinstance(indices, Mapping):
            indices = next((value for key, value in indices.items() if f".{module}".endswith(f".{key}")), None)
        if not indices:
            return [f"{module}: trained tokens, but trainable_token_indices of {CONFIG} does not say which"]
        update |= {"tokens": stored, "indices": tuple(indices)}
    else:
        update["whole"] = stored
    return []


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = float(_matching(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _matching(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of the module's name matches, as peft looks them up."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)
