"""llama: Llama 2 and 3, Mistral, Mixtral. Their query and key rows lie in llama.cpp as Meta trained them."""

import math
from collections.abc import Iterator

import gguf

from lite.gguf.architectures import layers, numbers, refusals
from lite.gguf.architectures.architecture import Architecture, Config
from lite.gguf.planned import Planned

_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_EXPERTS = {"gate": "w1", "down": "w2", "up": "w3"}


def _tensors(config: Config, names: frozenset[str]) -> Iterator[Planned]:
    yield from _stretches(config)
    yield from layers.ends(config, names)
    kind = layers.Attention(biases=tuple("qkvo") if config.get("attention_bias") else (), permuted=True)
    count, width = numbers.expert_count(config), config["intermediate_size"]
    for layer in range(config["num_hidden_layers"]):
        yield from layers.attention(config, layer, kind)
        yield from layers.norms(config, layer, _NORMS)
        if count:
            yield from layers.experts(
                config, layer, names, count=count, width=width, part="block_sparse_moe", spelling=_EXPERTS
            )
        else:
            yield from layers.gated(config, layer, width=width, biases=bool(config.get("mlp_bias")))


def _stretches(config: Config) -> Iterator[Planned]:
    """rope_freqs: by what Llama 3.1 divides each frequency, as fp32 computes it.

    With the wavelength 2π / f of a frequency f = θ^(−2i/H): 1 below C / high, `factor` above C / low, and between them
    1 / ((1 − s) / factor + s) where s = (C / wavelength − low) / (high − low); C is the first training's context.
    Source: `_compute_llama3_parameters` of transformers.
    """
    turn = numbers.rope(config)
    if turn["rope_type"] != "llama3":
        return
    import torch

    size = layers.head_size(config)
    frequencies = 1.0 / (turn["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size))  # (H / 2,)
    context, factor = turn["original_max_position_embeddings"], turn["factor"]
    low, high = turn["low_freq_factor"], turn["high_freq_factor"]
    factors = []
    for wavelength in 2 * math.pi / frequencies:
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(float(factor))
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    yield Planned("rope_freqs.weight", (len(factors),), (), values=tuple(factors))


def _numbers(writer: gguf.GGUFWriter, config: Config) -> None:
    numbers.sizes(writer, config)
    numbers.rotation(writer, config)
    numbers.heads(writer, config)
    if numbers.expert_count(config):
        numbers.experts(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(layers.head_size(config))


def _refuses(config: Config) -> Iterator[str]:
    yield from refusals.rope_type(config, "llama3")
    yield from refusals.setting(config, "hidden_act", "silu")


LLAMA = Architecture(
    name="llama",
    classes=("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
    tensors=_tensors,
    numbers=_numbers,
    refuses=_refuses,
    notes=refusals.window,
)
