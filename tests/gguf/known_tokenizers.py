"""Tokenizers as well-known models have them, made small: each function writes a folder and returns its config.json."""

from pathlib import Path
from typing import Any

from lite.gguf.pre_tokenizers import WAYS, way_json
from tests.gguf.tiny_tokenizers import INST, added, byte_level, sentence_pieces

NFC = {"type": "NFC"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def way(name: str) -> dict[str, Any]:
    """The pre-tokenizer of tokenizer.json that the name in llama.cpp stands for."""
    return way_json(next(one for one in WAYS if one.name == name))


def qwen2(folder: Path) -> dict[str, Any]:
    """Qwen 2's and 3's: NFC, no BOS, an answer ends with <|im_end|> or <|endoftext|>; rows of padding."""
    return byte_level(
        folder,
        way("qwen2"),
        normalizer=NFC,
        settings={
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "add_bos_token": False,
        },
        stops=("<|im_end|>", "<|endoftext|>"),
        template=CHATML,
        rows=512,
        model_type="qwen2",
    )


def llama3(folder: Path) -> dict[str, Any]:
    """Llama 3's: ignore_merges, BOS before every text, EOS of texts and of turns."""
    begin, end, turn = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
    return byte_level(
        folder,
        way("llama-bpe"),
        special=(begin, end, turn, "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"),
        ordinary=(),
        settings={"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end},
        stops=(end, "<|eom_id|>", turn),
        bos=begin,
        ignore_merges=True,
        template="{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['content'] }}<|eot_id|>{% endfor %}",
    )


def gpt2(folder: Path) -> dict[str, Any]:
    """GPT-2's: the regex is ByteLevel's own; a stop token that llama.cpp does not know by its text."""
    return byte_level(
        folder,
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        special=("<|endoftext|>", "<END_ANSWER>", "<END_TOOL>"),
        settings={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"},
        stops=("<END_ANSWER>", "<END_TOOL>"),
    )


def smollm(folder: Path) -> dict[str, Any]:
    """SmolLM's: digits one by one, then GPT-2's regex."""
    digits = {"type": "Digits", "individual_digits": True}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return byte_level(
        folder,
        {"type": "Sequence", "pretokenizers": [digits, last]},
        settings={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"},
        stops=("<|im_end|>",),
        template=CHATML,
    )


def tekken(folder: Path) -> dict[str, Any]:
    """Mistral's since NeMo: cased words, ignore_merges, BOS."""
    return byte_level(
        folder,
        way("tekken"),
        special=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        ordinary=(),
        settings={"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
        stops=("</s>",),
        bos="<s>",
        ignore_merges=True,
        template=INST,
    )


def gpt4o(folder: Path) -> dict[str, Any]:
    """GPT-4o's, which Phi-4-mini has."""
    return byte_level(
        folder,
        way("gpt-4o"),
        special=("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
        ordinary=(),
        settings={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "bos_token": "<|endoftext|>",
        },
        stops=("<|end|>", "<|endoftext|>"),
    )


def cl100k(folder: Path) -> dict[str, Any]:
    """Phi-4's: GPT-4's regex with possessive quantifiers and without `+` behind the newline, Llama 3's words."""
    regex = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return byte_level(
        folder,
        {"type": "Sequence", "pretokenizers": [split, last]},
        settings={"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"},
        model_type="phi3",
        stops=("<|im_end|>",),
        template=CHATML,
    )


PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
LLAMA2 = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def llama2(folder: Path) -> dict[str, Any]:
    """Llama 2's and Mistral 0.1's with their tokenizer.model, a space before each piece of text (legacy)."""
    return sentence_pieces(
        folder,
        settings=LLAMA2 | {"tokenizer_class": "LlamaTokenizer", "legacy": True},
        normalizer=PREPEND,
        own_model=True,
    )


def llama2_saved(folder: Path) -> dict[str, Any]:
    """The same as transformers 5 saves it: no tokenizer.model, no template."""
    return sentence_pieces(
        folder,
        settings=LLAMA2 | {"tokenizer_class": "LlamaTokenizer", "legacy": True},
        normalizer=PREPEND,
        template=None,
        special=[added("<|im_end|>", 0), added("<note>", 0, special=False)],
        rows=1024,
    )


def mistral3(folder: Path) -> dict[str, Any]:
    """Mistral 0.3's: a space before a text only, none behind a special token."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return sentence_pieces(
        folder,
        settings=LLAMA2 | {"tokenizer_class": "LlamaTokenizer", "legacy": False},
        pre_tokenizer=metaspace,
        special=[added("[INST]", 0), added("[/INST]", 0)],
        model_type="mistral",
    )


def gemma(folder: Path) -> dict[str, Any]:
    """Gemma's: no space before a text, runs of spaces and newlines are added tokens."""
    runs = [*("▁" * n for n in range(2, 9)), *("\n" * n for n in range(2, 5))]
    return sentence_pieces(
        folder,
        settings={
            "tokenizer_class": "GemmaTokenizer",
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
        },
        begin=("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<unused0>"),
        user_defined=runs,
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        pre_tokenizer={"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        bos="<bos>",
        stops=("<eos>", "<end_of_turn>"),
        template="{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['content'] }}<end_of_turn>\n{% endfor %}",
        model_type="gemma2",
        own_model=True,
    )


def phi3(folder: Path) -> dict[str, Any]:
    """Phi-3's: spaces behind a special token belong to it; ordinary added tokens."""
    roles = [added(token, 0, rstrip=True) for token in ("<|user|>", "<|assistant|>", "<|end|>", "<|placeholder1|>")]
    return sentence_pieces(
        folder,
        settings=LLAMA2 | {"tokenizer_class": "LlamaTokenizer", "legacy": False, "eos_token": "<|endoftext|>"},
        normalizer=PREPEND,
        special=[added("<|endoftext|>", 0), *roles],
        stops=("<|end|>", "<|endoftext|>", "<|assistant|>"),
        template="{% for m in messages %}<|user|>\n{{ m['content'] }}<|end|>\n{% endfor %}<|assistant|>\n",
        model_type="phi3",
        stripping=["</s>"],
        own_model=True,
    )


BYTE_LEVEL = {make.__name__: make for make in (qwen2, llama3, gpt2, smollm, tekken, gpt4o, cl100k)}
SENTENCE_PIECES = {make.__name__: make for make in (llama2, llama2_saved, mistral3, gemma, phi3)}
