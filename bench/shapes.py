"""Shapes to measure on: models with random weights, made where they compute, of the catalogue's sizes or small ones."""

from dataclasses import replace

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lite.data.examples import Place, TokenExample
from lite.model import catalog, load, matrices
from lite.model.layers import decoder_layers
from lite.model.norms import replace_norms
from lite.optim import blocks

STORAGES = ("nf4", "bf16", "fp32")  # of the layers' matrices; beside them int8, in blocks, whose weights are trained
# What a CPU computes in a second: Qwen3's architecture with the vocabularies of Llama 2 and of Qwen.
SMALL = {
    f"small-{vocabulary // 1000}k": catalog.Shape("", "qwen3", 6, 512, 1536, 8, 4, 64, vocabulary)
    for vocabulary in (32_000, 152_000)
}
SMALL["tiny"] = replace(SMALL["small-32k"], hidden_size=256, intermediate_size=768, heads=4, kv_heads=2,
                        vocab_size=8000)  # fmt: skip


def shape_named(name: str) -> catalog.Shape:
    """A small shape, or one of the catalogue."""
    return SMALL.get(name) or catalog.CATALOG[name]


def compute_dtype(storage: str, device: torch.device) -> torch.dtype:
    """What a model computes in. NF4: bf16, but on a CPU that multiplies fp32 faster."""
    if storage == "fp32" or (storage == "nf4" and device.type == "cpu" and not load.cpu_multiplies_bf16()):
        return torch.float32
    return torch.bfloat16


def random_model(shape: catalog.Shape, storage: str, device: torch.device) -> PreTrainedModel:
    """A model of this shape with random weights, as transformers would have it; nf4, int8: the layers' matrices only.

    Each matrix is made and quantised on the device by itself, so that no more than one is ever there in more bits.
    """
    config, dtype = catalog.config(shape), compute_dtype(storage, device)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if storage == "nf4":
        for layer in decoder_layers(model).values():
            for name, linear in [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]:
                layer.set_submodule(name, _four_bit(linear, device))
        model.is_loaded_in_4bit = True  # by which peft and TRL know it
    if storage == "int8":
        for linear in matrices.to_be_quantised(model).values():
            codes, scale = blocks.quantised(_normal(linear.weight, device))
            linear.weight = nn.Parameter(codes, requires_grad=False)
            linear.register_buffer(matrices.SCALE, scale)
            matrices.feed(linear)
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            if tensor.is_meta:
                value = torch.ones_like(tensor, device=device) if tensor.ndim == 1 else _normal(tensor, device)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    if shape.tied:
        model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    model.config.use_cache = False
    return model.requires_grad_(False)


def as_lite_loads(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with what lite's loader does to one."""
    replace_norms(model)
    load.steady(model)
    return model


def random_example(prompt: int, chosen: int, rejected: int, vocabulary: int) -> TokenExample:
    """A pair of random tokens."""
    draw = torch.randint(vocabulary, (prompt + chosen + rejected,)).tolist()
    completions = tuple(draw[prompt : prompt + chosen]), tuple(draw[prompt + chosen :])
    return TokenExample(tuple(draw[:prompt]), completions, Place("random", 1))


def _normal(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device).normal_(std=0.02)


def _four_bit(linear: nn.Linear, device: torch.device) -> bnb.nn.Linear4bit:
    dtype = linear.weight.dtype
    with torch.device("meta"):
        new = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
        )
    new.weight = bnb.nn.Params4bit(
        _normal(linear.weight, device), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    if linear.bias is not None:
        new.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=dtype, device=device), requires_grad=False)
    return new.to(device)
