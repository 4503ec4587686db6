"""Makes the bundled model and its preference data, from templates: `python -m lite.bundled.make`.

A tokenizer and a small Qwen3 are trained from scratch on conversations about the little world, in which the assistant
nearly always opens with a needless preamble; preference pairs say that the answer alone is better. So the model knows
the answers, has a habit that anyone can see, and loses it in a minute of `lite orpo`.

Left out: general knowledge, reasoning, anything not in the tables. A quarter of an hour on one CPU core. The same seed,
torch and number of threads give the same data byte for byte and the same weights on the same kind of processor.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from lite.bundled import FOLDER
from lite.bundled.conversations import conversation, preference_lines, split_questions

CONVERSATIONS = 60_000
VOCABULARY = 2048  # every byte, the merges, and three special tokens
# Steps, rows and tokens a row. The long rows at the end teach that a turn may stand anywhere in the context of 4,096.
STAGES = ((1300, 4, 512), (60, 1, 4096))
LEARNING_RATE = 3e-3

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Qwen2's: contractions, words with the sign before them, single digits, punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def main() -> None:
    """Make the model and its data, and say how it goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="where to write model/, train.jsonl, held_out.jsonl"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    chance = random.Random(settings.seed)

    settings.folder.mkdir(parents=True, exist_ok=True)
    train, held_out, known = split_questions(chance)
    for name, asked in (("train", train), ("held_out", held_out)):
        (settings.folder / f"{name}.jsonl").write_text(preference_lines(asked, known, chance), encoding="utf-8")
        print(f"{name}.jsonl: {len(asked)} pairs")

    conversations = [conversation(known, chance) for _ in range(CONVERSATIONS)]
    tokenizer = train_tokenizer(message["content"] for turns in conversations for message in turns)
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    needed = sum(steps * rows * length for steps, rows, length in STAGES)
    model = new_model(tokenizer)
    train_model(model, torch.tensor([*tokens_of(tokenizer, texts, needed)]))
    save(model, tokenizer, settings.folder / "model")


# ── the tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────


def train_tokenizer(texts: Iterator[str]) -> Qwen2Tokenizer:
    """Byte-level BPE, split as Qwen2 splits; any text has tokens, since every byte is one."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 3, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    # The roles are words of the template, not of any message.
    bpe.train_from_iterator([*texts, *["system user assistant"] * 100], trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        unk_token=None,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    print(f"tokenizer: {len(tokenizer)} tokens")
    return tokenizer


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────


def new_model(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """A Qwen3 of 3.7 million random weights, all sizes multiples of 256 so that every quantisation takes them."""
    end_of_text, turn_end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=turn_end,
        pad_token_id=end_of_text,
    )
    model = Qwen3ForCausalLM(config).float()
    stops = [turn_end, end_of_text]
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=stops, pad_token_id=end_of_text)
    return model


def train_model(model: Qwen3ForCausalLM, ids: Tensor) -> None:
    """Train all weights on all tokens of one long text. ids (T,) int64: as many as the stages take."""
    decayed = [weight for weight in model.parameters() if weight.dim() == 2]
    kept = [weight for weight in model.parameters() if weight.dim() != 2]  # norms are scales: no pull to zero
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))
    steps, step, start, begun = sum(stage[0] for stage in STAGES), 0, 0, time.monotonic()
    for stage_steps, rows, length in STAGES:
        for _ in range(stage_steps):
            loss = next_token_loss(model, ids[start : start + rows * length].view(rows, length))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min((step + 1) / 50, (steps - step) / (0.6 * steps), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            start, step = start + rows * length, step + 1
            if step % 50 == 0:
                print(f"step {step}/{steps}: loss {loss.item():.3f}, {time.monotonic() - begun:.0f} s", flush=True)


def tokens_of(tokenizer: Qwen2Tokenizer, texts: list[str], count: int) -> Iterator[int]:
    """The first `count` tokens of the texts, each ended by end-of-text, from the first text again if they run out."""
    end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    while True:
        for ids in tokenizer(texts)["input_ids"]:
            for token in (*ids, end_of_text):
                if count == 0:
                    return
                count -= 1
                yield token


def next_token_loss(model: Qwen3ForCausalLM, batch: Tensor) -> Tensor:
    """Mean of −log p of every token but the first of each row. batch (B, T) int64."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]  # (B, T − 1, V)
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def save(model: Qwen3ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write the model, in bf16, and its tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size_bytes / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
