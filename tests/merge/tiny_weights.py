"""Tiny bases, adapters trained by nobody, and weights in memory, for what reads and writes weights by rows."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lite.merge.weights import Merged
from lite.model import shards

IDS = torch.arange(3, 43)[None]


class InMemory:
    """Weights that are a dictionary of tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        tensor = self.tensors[name]
        return (tensor[start:stop] if tensor.ndim else tensor).clone()


def write_base(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of weights large enough to matter, and its folder."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    model = model.to(dtype).eval()
    model.tie_weights()
    model.save_pretrained(folder)
    return model


def write_adapter(folder: Path, model: PreTrainedModel, **settings: object) -> Tensor:
    """An adapter on `model` with all its weights moved, saved by peft; returns the live model's logits of IDS."""
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        adapted.eval()
        adapted.save_pretrained(str(folder))
        return adapted(IDS).logits


def written_logits(folder: Path, base: Path, merged: Merged) -> Tensor:
    """The logits of IDS, as transformers computes them from `merged` written to `folder` in several shards."""
    folder.mkdir()
    shards.write(folder, merged, dict.fromkeys(merged.shapes, torch.float32), shard_bytes=100_000)
    config = json.loads((base / "config.json").read_text())
    if merged.untied:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return model.eval()(IDS).logits
