"""qwen: Qwen2 and 2.5 (with biases on q, k, v), Qwen3 (with norms of each head), and their mixtures of experts."""

from collections.abc import Iterator

import gguf

from lite.gguf.architectures import layers, numbers, refusals
from lite.gguf.architectures.architecture import Architecture, Config
from lite.gguf.planned import Planned, planned

_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_EXPERTS = {"down": "down_proj", "gate": "gate_proj", "up": "up_proj"}


def _attention(config: Config) -> layers.Attention:
    if config["model_type"] in ("qwen2", "qwen2_moe"):
        return layers.Attention(biases=tuple("qkv") if config.get("qkv_bias", True) else ())
    return layers.Attention(norms=True)


def _dense(config: Config, names: frozenset[str]) -> Iterator[Planned]:
    yield from layers.ends(config, names)
    for layer in range(config["num_hidden_layers"]):
        yield from layers.attention(config, layer, _attention(config))
        yield from layers.norms(config, layer, _NORMS)
        yield from layers.gated(config, layer, width=config["intermediate_size"])


def _mixture(config: Config, names: frozenset[str]) -> Iterator[Planned]:
    yield from layers.ends(config, names)
    count, width = numbers.expert_count(config), config["moe_intermediate_size"]
    for layer in range(config["num_hidden_layers"]):
        yield from layers.attention(config, layer, _attention(config))
        yield from layers.norms(config, layer, _NORMS)
        yield from layers.experts(config, layer, names, count=count, width=width, part="mlp", spelling=_EXPERTS)
        if shared := config.get("shared_expert_intermediate_size"):
            yield from layers.gated(config, layer, width=shared, part="mlp.shared_expert", suffix="_shexp")
            router = layers.BLOCK.format(layer=layer) + "mlp.shared_expert_gate.weight"
            yield planned(f"blk.{layer}.ffn_gate_inp_shexp.weight", router, (1, config["hidden_size"]))


def _numbers(writer: gguf.GGUFWriter, config: Config) -> None:
    numbers.sizes(writer, config)
    numbers.rotation(writer, config)
    numbers.heads(writer, config)


def _mixture_numbers(writer: gguf.GGUFWriter, config: Config) -> None:
    _numbers(writer, config)
    numbers.experts(writer, config)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if shared := config.get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(shared)


def _refuses(config: Config) -> Iterator[str]:
    yield from refusals.rope_type(config)
    yield from refusals.setting(config, "hidden_act", "silu")
    yield from refusals.setting(config, "attention_bias", False)


def _mixture_refuses(config: Config) -> Iterator[str]:
    yield from _refuses(config)
    yield from refusals.setting(config, "norm_topk_prob", config["model_type"] == "qwen3_moe")
    yield from refusals.setting(config, "decoder_sparse_step", 1)
    if config.get("mlp_only_layers"):
        yield f"mlp_only_layers {config['mlp_only_layers']}; llama.cpp has experts in every layer"


QWEN2 = Architecture("qwen2", ("Qwen2ForCausalLM",), _dense, _numbers, _refuses, refusals.window)
QWEN3 = Architecture("qwen3", ("Qwen3ForCausalLM",), _dense, _numbers, _refuses, refusals.window)
QWEN2_MOE = Architecture(
    "qwen2moe", ("Qwen2MoeForCausalLM",), _mixture, _mixture_numbers, _mixture_refuses, refusals.window
)
QWEN3_MOE = Architecture(
    "qwen3moe", ("Qwen3MoeForCausalLM",), _mixture, _mixture_numbers, _mixture_refuses, refusals.window
)
