"""What is measured on: a random model with a vocabulary of real size, and rows that every contender reads alike."""

import json
import random
from pathlib import Path
from typing import Any

from measuring import read_lines

Rows = list[dict[str, Any]]


def make_model(folder: Path) -> None:
    """A random Qwen3 of 12 layers with the bundled tokenizer; its vocabulary is larger than the tokenizer's."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from lite.model.catalog import BUNDLED_MODEL

    config = Qwen3Config(
        vocab_size=151_936, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=False, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED_MODEL).save_pretrained(folder)


def copy_bundled_model(folder: Path) -> None:
    """The tiny trained model, where its files may be written beside."""
    import shutil

    from lite.model.catalog import BUNDLED_MODEL

    shutil.copytree(BUNDLED_MODEL, folder)


def make_adapter(model: Path, folder: Path) -> None:
    """An adapter on all linear layers of the model that is no zero: random, and small enough for a loss near log 2."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(folder)


def bundled_rows(count: int, start: int = 0) -> Rows:
    """Rows of the bundled data as plain text, since TRL and lite end a chat's last turn differently."""
    from lite.bundled import FOLDER

    def text(value: Any) -> str:
        return value if isinstance(value, str) else value[-1]["content"]

    rows = read_lines(FOLDER / "train.jsonl")[start : start + count]
    return [
        {"prompt": text(r["prompt"]), "chosen": f" {text(r['chosen'])}", "rejected": f" {text(r['rejected'])}"}
        for r in rows
    ]


def random_rows(count: int, prompt: int, completion: int) -> Rows:
    """Rows of about so many tokens, out of the bundled data's words."""
    from transformers import AutoTokenizer

    from lite.model.catalog import BUNDLED_MODEL

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    words = " ".join(row["chosen"] for row in bundled_rows(1000)).split()
    draw = random.Random(0)

    def text(tokens: int) -> str:
        found: list[str] = []
        while len(tokenizer(" ".join(found)).input_ids) < tokens:
            found += draw.choices(words, k=5)
        return " ".join(found)

    return [
        {"prompt": text(prompt), "chosen": f" {text(completion)}", "rejected": f" {text(completion)}"}
        for _ in range(count)
    ]


def write_rows(folder: Path, rows: Rows) -> None:
    """The rows to train on; the first of them is held out as well, so that none is taken away for evaluation."""
    for name, part in (("rows.jsonl", rows), ("held_out.jsonl", rows[:1])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
