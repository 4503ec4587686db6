"""The numbers of an architecture, as keys and values: what llama.cpp must know to run the tensors.

Keys, and which of them a family has, are those of llama.cpp's converter: a file that it would not write is a file that
nobody has tried.
"""

import math
from collections.abc import Mapping
from typing import Any

import gguf

from lite.gguf.architectures.architecture import Config
from lite.gguf.architectures.layers import head_size


def rope(config: Config) -> Mapping[str, Any]:
    """How positions turn: `rope_theta`, `rope_type`, `factor`, … of the layers with full attention.

    config.json has them in `rope_parameters`, one set or one a kind of layer, and before transformers 5 in
    `rope_scaling` and beside it.
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found = dict(found.get("full_attention", found))
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if found.get(name) is None and config.get(name) is not None:
            found[name] = config[name]
    if "rope_type" not in found:
        found["rope_type"] = found.get("type", "default")
    return found


def sliding_rope_theta(config: Config) -> float | None:
    """The base of the layers with sliding attention, where it is one of their own."""
    own = (config.get("rope_parameters") or {}).get("sliding_attention")
    return own["rope_theta"] if own else config.get("rope_local_base_freq")


def sizes(writer: gguf.GGUFWriter, config: Config) -> None:
    """What every family says: lengths, heads, epsilon."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def heads(writer: gguf.GGUFWriter, config: Config) -> None:
    """The size of a head, where config.json says it."""
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])


def rotation(writer: gguf.GGUFWriter, config: Config) -> None:
    """The base of the rotary embedding, and how it is stretched; llama3's is a tensor, `rope_freqs`."""
    turn = rope(config)
    if turn["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(turn["factor"])
    elif turn["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(turn["factor"])
        writer.add_rope_scaling_orig_ctx_len(turn["original_max_position_embeddings"])
        by_factor, wanted = _mscale(turn["factor"]), yarn_attention_factor(turn)
        if not math.isclose(wanted, by_factor):
            # llama.cpp computes the one itself and multiplies it by this; of the keys below it reads none here.
            writer.add_rope_scaling_attn_factors(wanted / by_factor)
        for name, add in (
            ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if turn.get(name) is not None:
                add(turn[name])
    elif turn["rope_type"] == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_freq_base(turn["rope_theta"])


def yarn_attention_factor(turn: Mapping[str, Any]) -> float:
    """By what YaRN multiplies queries and keys. Source: `_compute_yarn_parameters` of transformers."""
    if turn.get("attention_factor") is not None:
        return turn["attention_factor"]
    if turn.get("mscale") and turn.get("mscale_all_dim"):
        return _mscale(turn["factor"], turn["mscale"]) / _mscale(turn["factor"], turn["mscale_all_dim"])
    return _mscale(turn["factor"])


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def experts(writer: gguf.GGUFWriter, config: Config) -> None:
    """How many experts there are, and how many a token goes to."""
    writer.add_expert_count(expert_count(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])


def expert_count(config: Config) -> int:
    """E, however config.json spells it; 0 for a dense model."""
    return config.get("num_local_experts") or config.get("num_experts") or 0


def rotary_size(config: Config) -> int:
    """How many numbers of a head turn."""
    return int(head_size(config) * (rope(config).get("partial_rotary_factor") or 1.0))
