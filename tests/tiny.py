"""A chat model small enough to train in a second, with its tokenizer, and pairs for it: all made on the spot."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_model(folder: Path) -> None:
    """A Qwen3 of two layers over bytes, with random weights."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(str(folder))
    config = Qwen3Config(
        vocab_size=len(alphabet) + len(special),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(str(folder))


def write_pairs(path: Path, count: int) -> None:
    """Short questions whose rejected answer has a needless preamble; lengths differ from row to row."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            answer = "yes " * (1 + i % 3)
            row = {"prompt": f"Is {i} a number{'?' * (i % 4)}", "chosen": answer, "rejected": f"Well, {answer}"}
            file.write(json.dumps(row) + "\n")


def write_world(folder: Path) -> Path:
    """`model`, `pairs.jsonl` (20 rows) and `held_out.jsonl` (3 rows) in a folder."""
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", 20)
    write_pairs(folder / "held_out.jsonl", 3)
    return folder


def tiny_settings(tiny: Path, **changes: object) -> dict[str, object]:
    """Settings of ten steps of four pairs each, two epochs, a checkpoint every three."""
    return {
        "method": "orpo",
        "model": str(tiny / "model"),
        "data": str(tiny / "pairs.jsonl"),
        "eval_data": str(tiny / "held_out.jsonl"),
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "save_steps": 3,
        "samples": 1,
        **changes,
    }
