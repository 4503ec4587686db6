"""Tiny adapters for the tiny models of tests/gguf, their numbers by integer arithmetic: the same bytes everywhere."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.gguf.tiny import numbers

RANK, ALPHA = 4, 12
# model of tests/gguf/tiny.py → suffixes of the adapted modules
ADAPTED = {
    "llama3": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "llama2": ("q_proj", "k_proj", "lm_head", "embed_tokens"),
    "qwen3": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gemma2": ("q_proj", "o_proj", "down_proj"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
}


def write_adapter(base: Path, folder: Path, targets: tuple[str, ...], **changes: Any) -> Path:
    """A peft folder with an adapter on every module of `base` that is named so; `changes` are of its config."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "bias": "none"}
    config |= {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": sorted(targets)} | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(base / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            module = name.removesuffix(".weight")
            if not module.endswith(targets):
                continue
            rows, columns = weights.get_slice(name).get_shape()
            rank = config.get("rank_pattern", {}).get(module.rpartition(".")[2], config["r"])
            a, b, end = "lora_A.weight", "lora_B.weight", (rows, columns)
            if module.endswith("embed_tokens"):
                a, b, end = "lora_embedding_A", "lora_embedding_B", (columns, rows)
            for letter, shape in ((a, (rank, end[1])), (b, (end[0], rank))):
                key = f"base_model.model.{module}.{letter}"
                tensors[key] = numbers(key, shape)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
