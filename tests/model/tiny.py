"""Tiny models that can be quantised: widths are multiples of 64, NF4's block; and a tokenizer. No network."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.architectures import ARCHITECTURES as ALL
from tests.architectures import tiny_config

VOCABULARY = 320
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
# LongRoPE's factors go by head size, and its weights are Phi-3's.
ARCHITECTURES = [name for name in ALL if name != "phi3-longrope"]
DENSE = [name for name in ARCHITECTURES if name != "qwen3-moe"]


def tiny_model(architecture: str, **changes: object) -> PreTrainedModel:
    """Two layers, hidden 128, random weights that are the same each time."""
    experts = {"moe_intermediate_size": 64} if architecture == "qwen3-moe" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config(architecture, **(SIZES | experts | changes)))


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
