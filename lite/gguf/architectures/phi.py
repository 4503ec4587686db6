"""phi3: Phi-3, 3.5 and 4. q, k, v lie in one matrix, gate and up in another, and stay so."""

import math
from collections.abc import Iterator

import gguf

from lite.gguf.architectures import layers, numbers, refusals
from lite.gguf.architectures.architecture import Architecture, Config
from lite.gguf.planned import Planned, planned

_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def _tensors(config: Config, names: frozenset[str]) -> Iterator[Planned]:
    turn = numbers.rope(config)
    if turn["rope_type"] == "longrope":
        for length in ("long", "short"):
            factors = tuple(map(float, turn[f"{length}_factor"]))
            yield Planned(f"rope_factors_{length}.weight", (len(factors),), (), values=factors)
    yield from layers.ends(config, names)
    hidden, width, size = config["hidden_size"], config["intermediate_size"], layers.head_size(config)
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    for layer in range(config["num_hidden_layers"]):
        for target, source, shape in (
            ("attn_qkv", "self_attn.qkv_proj", (queries + 2 * keys, hidden)),
            ("attn_output", "self_attn.o_proj", (hidden, queries)),
            ("ffn_up", "mlp.gate_up_proj", (2 * width, hidden)),  # gate first
            ("ffn_down", "mlp.down_proj", (hidden, width)),
        ):
            tensor = f"{layers.BLOCK.format(layer=layer)}{source}.weight"
            yield planned(f"blk.{layer}.{target}.weight", tensor, shape)
        yield from layers.norms(config, layer, _NORMS)


def _numbers(writer: gguf.GGUFWriter, config: Config) -> None:
    numbers.sizes(writer, config)
    turn = numbers.rope(config)
    first, longest = turn["original_max_position_embeddings"], config["max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(first)
    writer.add_rope_dimension_count(numbers.rotary_size(config))
    writer.add_rope_freq_base(turn["rope_theta"])
    # Phi-3's window is written and llama.cpp does not use it; 0 tells it a Phi-4.
    writer.add_sliding_window(config.get("sliding_window") or 0)
    if turn["rope_type"] == "longrope":
        stretched = longest / first
        factor = math.sqrt(1 + math.log(stretched) / math.log(first)) if stretched > 1 else 1.0
        factor = factor if turn.get("attention_factor") is None else turn["attention_factor"]
        writer.add_rope_scaling_attn_factors(factor)


def _refuses(config: Config) -> Iterator[str]:
    yield from refusals.setting(config, "hidden_act", "silu")
    turn = numbers.rope(config)
    if turn["rope_type"] not in ("default", "longrope"):
        yield f"rope_type {turn['rope_type']!r}; known for it: default, longrope"
    elif turn["rope_type"] == "longrope":
        wanted = numbers.rotary_size(config) // 2
        for name in ("long_factor", "short_factor"):
            if len(turn[name]) != wanted:
                yield f"{name} of {len(turn[name])} numbers; its heads turn {wanted} pairs"


def _notes(config: Config) -> Iterator[str]:
    yield from refusals.window(config)
    turn = numbers.rope(config)
    if turn["rope_type"] == "longrope":
        first = turn["original_max_position_embeddings"]
        yield (
            f"texts of up to {first:,} tokens have other rotary factors than longer ones; llama.cpp goes by the "
            f"context that it is started with: give it {first:,} (-c) for short texts"
        )


PHI3 = Architecture("phi3", ("Phi3ForCausalLM",), _tensors, _numbers, _refuses, _notes)
