"""Tiny models of every architecture that becomes a GGUF file, weights and tokenizers by integer arithmetic.

Any machine makes the same bytes, so that what llama.cpp's converter made of them can be recorded once.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.gguf.tiny_tokenizers import write_sentencepiece_model

VOCABULARY = 320  # rows of the embedding; both tokenizers have fewer tokens
_SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
_LONGROPE |= {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
_GEMMA = {"head_dim": 32, "tie_word_embeddings": True}
_GEMMA2 = {**_GEMMA, "query_pre_attn_scalar": 32, "sliding_window": 32}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
# name → class of the config, settings, tokenizer. A name is the folder's too.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}, "qwen2"),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "intermediate_size": 80}, "qwen2"),  # rows of 80: no blocks of 32
    "qwen3-yarn": ("Qwen3Config", {"head_dim": 16, "rope_parameters": _YARN}, "qwen2"),
    "llama2": (
        "LlamaConfig",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        },
        "llama-spm",
    ),
    "llama3": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 128}},
        "llama-bpe",
    ),
    "mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": None}, "llama-spm"),
    "mixtral": (
        "MixtralConfig",
        {"num_local_experts": 12, "num_experts_per_tok": 2},
        "llama-spm",
    ),  # 12: 10 sorts before 2
    "gemma": ("GemmaConfig", _GEMMA, "gemma-spm"),
    "gemma2": ("Gemma2Config", _GEMMA2, "gemma-spm"),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA2, "num_hidden_layers": 7}, "gemma-spm"),
    "gemma3-images": ("Gemma3Config", _GEMMA2, "gemma-spm"),
    "phi3": ("Phi3Config", {"sliding_window": 64, "pad_token_id": 0}, "phi-spm"),
    "phi3-longrope": (
        "Phi3Config",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 128, "pad_token_id": 0},
        "phi-spm",
    ),
    "qwen2moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
        "qwen2",
    ),
    "qwen3moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 12,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
        "qwen2",
    ),
}
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES
_MERGES = ["i n", "t h", "th e", "Ġ the", "e r", "o n", "a n", "an d", "Ġ and", "r e", "Ġ a"]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def write_model(folder: Path, name: str, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The model `name` of MODELS in `folder/name`, with its tokenizer; returns that folder."""
    kind, changes, tokenizer = MODELS[name]
    target = folder / name
    config = config_of(kind, changes)
    with torch.device("meta"):
        model = (
            transformers.AutoModelForImageTextToText if kind == "Gemma3Config" else transformers.AutoModelForCausalLM
        )
        made = model.from_config(config, dtype=dtype)
    made = made.to_empty(device="cpu")
    made.tie_weights()
    with torch.no_grad():
        for tensor, weight in made.named_parameters():
            weight.copy_(numbers(tensor, tuple(weight.shape), shifted="gemma" in name))
    made.generation_config.eos_token_id = 2
    made.save_pretrained(str(target))
    (write_sentence_pieces if tokenizer.endswith("spm") else write_byte_bpe)(target, tokenizer)
    return target


def config_of(kind: str, changes: dict[str, Any]) -> transformers.PretrainedConfig:
    """A config of tiny sizes; that of a model with images has them in its text's."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "Gemma3Config":
        text = {**_SIZES, **ids, **changes}
        return transformers.Gemma3Config(
            text_config=text, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=3
        )
    return getattr(transformers, kind)(**{**_SIZES, **ids, **changes})


def numbers(name: str, shape: tuple[int, ...], *, shifted: bool = False) -> torch.Tensor:
    """A tensor's numbers, which bf16 holds exactly: norms in [0.5, 1.5), less 1 if `shifted`; all else k · 2^-e.

    float32; k in [-127, 127] by a multiplicative hash of the place, salted with the tensor's name.
    """
    place = np.arange(int(np.prod(shape)), dtype=np.uint64)
    salt = np.uint64(zlib.crc32(name.encode()))
    mixed = ((place + salt) * np.uint64(2654435761) % np.uint64(2**32)) * np.uint64(40503) % np.uint64(2**32)
    hashed = (mixed >> np.uint64(16)) % np.uint64(255)
    if "norm" in name and len(shape) == 1:
        made = (hashed % np.uint64(16)).astype(np.float32) / 16 + (-0.5 if shifted else 0.5)
    else:
        made = (hashed.astype(np.float32) - 127) / (64 if "embed" in name else 512)
    return torch.from_numpy(made.reshape(shape))


def write_byte_bpe(folder: Path, pre: str) -> None:
    """A byte-level BPE whose words are cut as Qwen2 or Llama 3 cuts them; special tokens at the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["!!pad", "!!bos", "!!eos", *alphabet, *(merge.replace(" ", "") for merge in _MERGES)]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(
        models.BPE(ids, [tuple(merge.split()) for merge in _MERGES], ignore_merges=pre == "llama-bpe")
    )
    words = Regex(_WORDS % ("{1,3}" if pre == "llama-bpe" else ""))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["!!pad", "!!bos", "!!eos", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if pre == "llama-bpe":
        tokenizer.post_processor = processors.TemplateProcessing("!!bos $A", special_tokens=[("!!bos", 1)])
    _save(tokenizer, folder, bos="!!bos", eos="!!eos", pad="!!pad")


def write_sentence_pieces(folder: Path, family: str) -> None:
    """A SentencePiece BPE with byte fallback: tokenizer.model, and the tokenizer.json of the same.

    family: llama's puts a space before a text, gemma's does not; phi's has added tokens.
    """
    words = ["in", "th", "the", "▁the", "er", "on", "an", "and", "▁a"]
    letters = "▁etaoinshrdlu."
    pieces = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    ]
    pieces += [(word, float(-rank), 1) for rank, word in enumerate(words)]
    pieces += [(letter, float(-len(words) - rank), 1) for rank, letter in enumerate(letters)]
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    halves = [next((w[:i], w[i:]) for i in range(1, len(w)) if w[:i] in ids and w[i:] in ids) for w in words]
    tokenizer = Tokenizer(models.BPE(ids, halves, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prefix = [] if family == "gemma-spm" else [normalizers.Prepend("▁")]
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    if family == "phi-spm":
        roles = ("<|endoftext|>", "<|user|>", "<|end|>")
        tokenizer.add_special_tokens([AddedToken(token, rstrip=True, normalized=False) for token in roles])
    _save(tokenizer, folder, bos="<s>", eos="</s>", pad="<unk>", unk="<unk>")
    write_sentencepiece_model(folder / "tokenizer.model", pieces)


def _save(tokenizer: Tokenizer, folder: Path, **special: str) -> None:
    named = {f"{name}_token": token for name, token in special.items()}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(str(folder))
    # As published models have it and transformers 5 no longer saves it: the converter looks nowhere else.
    path = folder / "tokenizer_config.json"
    added = {i: {"content": token.content, "special": token.special} for i, token in fast.added_tokens_decoder.items()}
    settings = json.loads(path.read_text(encoding="utf-8")) | {"added_tokens_decoder": added}
    path.write_text(json.dumps(settings), encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
