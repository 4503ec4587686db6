"""Tiny models of every architecture that lite promises, and a tokenizer, made from configs without a network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 320

# What each architecture needs beside the common sizes.
ARCHITECTURES = {
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 32, "sliding_window": 8},
    "gemma3_text": {"head_dim": 32, "sliding_window": 8},
    "phi3": {},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "qwen3_moe": {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
DENSE = [name for name in ARCHITECTURES if name != "qwen3_moe"]


def tiny_model(model_type: str, **changes: object) -> PreTrainedModel:
    """Two layers, hidden 128, random weights that are the same each time."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **ARCHITECTURES[model_type],
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(sizes | changes)))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges worth the name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the model answers the question"], trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the folder of a tiny saved model by its architecture, once a session. Do not write into it."""
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            tiny_model(model_type).save_pretrained(made[model_type])
            tiny_tokenizer().save_pretrained(made[model_type])
        return made[model_type]

    return folder


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids of two rows, longer than the sliding windows above: (2, 16)."""
    return torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
