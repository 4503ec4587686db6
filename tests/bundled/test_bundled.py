"""The bundled model and data: small, well-formed, with the habit that training is to break."""

import json
import random
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lite.bundled import FOLDER, conversations, world
from lite.recipe import Recipe, read_yaml


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER / "model")


@cache
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32).eval()


@cache
def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def mean_logp(prompt: list[dict], completion: list[dict]) -> float:
    """Mean over the completion and its end of turn, from whole logits of the completion alone."""
    head = tokenizer().apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    head_ids = tokenizer()(head)["input_ids"]
    ids = torch.tensor([head_ids + tokenizer()(completion[0]["content"] + "<|im_end|>")["input_ids"]])
    with torch.no_grad():
        logps = model()(input_ids=ids).logits[0, :-1].log_softmax(-1)  # (T − 1, V)
    return logps.gather(-1, ids[0, 1:, None])[len(head_ids) - 1 :].mean().item()


def test_everything_is_under_ten_megabytes() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) < 10_000_000
    assert all((FOLDER / f"{name}.jsonl").stat().st_size < 500_000 for name in ("train", "held_out"))


def test_every_linear_can_be_quantised() -> None:
    """K-quants take rows in blocks of 256, so the inputs of every matrix are multiples of it."""
    config = model().config
    assert config.model_type == "qwen3"
    assert config.max_position_embeddings >= 4096
    linears = [module for module in model().model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 7 * config.num_hidden_layers
    assert all(linear.in_features % 256 == 0 for linear in linears)
    assert config.hidden_size % 256 == config.intermediate_size % 256 == 0


def test_weights_are_stored_in_bf16_with_one_embedding() -> None:
    stored = AutoModelForCausalLM.from_pretrained(FOLDER / "model")
    assert {weight.dtype for weight in stored.parameters()} == {torch.bfloat16}
    assert stored.lm_head.weight is stored.model.embed_tokens.weight


@pytest.mark.parametrize(
    "text",
    [
        "".join(map(chr, range(128))),
        "Brasília, Bogotá, Reykjavík, Schlüssel, œuf, niño",
        "日本語 中文 한국어 ไทย العربية עברית हिन्दी ქართული Ελληνικά Русский አማርኛ",
        "👩‍👩‍👧 🇨🇭 🫠 \U0001f9d1🏽‍🚀",
        "  two  spaces\n\n\ttab\r\n  end ",
        "\ue000\ufffd\U0010ffff\u200b\u202e",
        "it's 1234567890 ==> {code}; don't",
    ],
)
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    assert tokenizer().decode(tokenizer()(text)["input_ids"]) == text


def test_every_byte_is_a_token_and_text_is_normalised() -> None:
    vocabulary = tokenizer().get_vocab()
    alphabet = [token for token in vocabulary if len(token) == 1]
    assert len(alphabet) == 256
    assert max(vocabulary.values()) < model().config.vocab_size
    assert tokenizer()("cafe\u0301")["input_ids"] == tokenizer()("café")["input_ids"]


def test_digits_stand_alone_as_in_qwen() -> None:
    assert tokenizer().tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]


def test_template_renders_chat_turns() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]
    whole = tokenizer().apply_chat_template(turns, tokenize=False)
    assert whole == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
    )
    prompt = tokenizer().apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert tokenizer()(whole)["input_ids"][-2:] == [tokenizer().eos_token_id, *tokenizer()("\n")["input_ids"]]


def test_a_turn_ends_by_either_stop_token() -> None:
    stops = tokenizer().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model().generation_config.eos_token_id == stops
    assert tokenizer().eos_token_id == stops[0]
    assert tokenizer().pad_token_id == model().generation_config.pad_token_id == stops[1]


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_rows_are_preference_pairs(name: str) -> None:
    assert len(rows(name)) >= {"train": 600, "held_out": 100}[name]
    for row in rows(name):
        assert set(row) == {"prompt", "chosen", "rejected"}
        assert row["prompt"][-1]["role"] == "user"
        assert [turn["role"] for turn in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]
        contents = [turn["content"] for turn in [*row["prompt"], *row["chosen"], *row["rejected"]]]
        assert all(content.strip() == content and content for content in contents)
        assert row["chosen"] != row["rejected"]


def test_the_script_makes_the_data_that_is_here() -> None:
    chance = random.Random(1)
    train, held_out, known = conversations.split_questions(chance)
    for name, asked in (("train", train), ("held_out", held_out)):
        made = conversations.preference_lines(asked, known, chance)
        assert made == (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")


def test_conversations_of_all_shapes_are_there() -> None:
    shapes = {tuple(turn["role"] for turn in row["prompt"]) for row in rows("train")}
    assert {("user",), ("system", "user"), ("user", "assistant", "user")} <= shapes


def test_length_alone_does_not_tell_chosen() -> None:
    longer = [len(row["chosen"][0]["content"]) >= len(row["rejected"][0]["content"]) for row in rows("train")]
    assert 0.05 < sum(longer) / len(longer) < 0.5


def test_held_out_prompts_are_not_in_training() -> None:
    """The question itself counts, without the greeting before it."""
    asked = {question.text for topic in world.TOPICS.values() for question in world.questions(topic)}
    questions = {
        name: {next(q for q in asked if row["prompt"][-1]["content"].endswith(q)) for row in rows(name)}
        for name in ("train", "held_out")
    }
    assert len(questions["held_out"]) == len(rows("held_out"))
    assert not questions["held_out"] & questions["train"]


def test_questions_of_the_world_are_all_different() -> None:
    texts = [question.text for topic in world.TOPICS.values() for question in world.questions(topic)]
    assert len(set(texts)) == len(texts) > 2500


def test_answers_end() -> None:
    prompts = [row["prompt"] for row in rows("held_out")[:12]]
    for prompt in prompts:
        inputs = tokenizer().apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model().generate(**inputs, max_new_tokens=64)[0]
        assert ids[-1].item() == tokenizer().convert_tokens_to_ids("<|im_end|>")


def test_the_whole_context_is_usable() -> None:
    """Far into the context the loss on conversations is what it is near the start, within half a nat."""
    text = "".join(
        tokenizer().apply_chat_template([*row["prompt"], *row["rejected"]], tokenize=False) + "<|endoftext|>"
        for row in rows("train")
    )
    ids = torch.tensor([tokenizer()(text)["input_ids"][:4096]])
    with torch.no_grad():
        logits = model()(input_ids=ids).logits  # (1, T, V)
    assert torch.isfinite(logits).all()
    losses = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")  # (T − 1,)
    assert losses[-1024:].mean() < losses[:1024].mean() + 0.5


def test_before_training_the_preamble_is_the_likelier() -> None:
    wins = [
        mean_logp(row["prompt"], row["chosen"]) > mean_logp(row["prompt"], row["rejected"]) for row in rows("held_out")
    ]
    assert sum(wins) / len(wins) <= 0.6


def test_recipe_fits_every_method() -> None:
    values = read_yaml(FOLDER / "recipe.yaml")
    assert "method" not in values
    for method in ("orpo", "sft", "simpo", "cpo"):
        recipe = Recipe(**values, method=method)
        assert set(recipe.hyperparameters) == set(recipe.signature.hyperparameters)
        assert recipe.model == recipe.data == "bundled"
