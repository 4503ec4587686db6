"""Tiny configs of every architecture that lite promises."""

import transformers
from transformers import PretrainedConfig

VOCABULARY = 211
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "factor": 4.0,
}
WINDOW = 16  # shorter than most rows of `token_examples`
EXPERTS = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {"sliding_window": WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", {}),
    "phi3-longrope": ("Phi3Config", {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0, "attention_multiplier": 0.2, "embedding_multiplier": 2.0}),
    "qwen3-moe": ("Qwen3MoeConfig", EXPERTS),
}  # fmt: skip


def tiny_config(architecture: str, **changes: object) -> PretrainedConfig:
    name, own = ARCHITECTURES[architecture]
    return getattr(transformers, name)(**{**SIZES, **own, **changes})
