"""Tokenizers small enough to make on the spot, built as those of well-known models are: their merges are learnt from
a few sentences, by whole numbers alone, so that the same bytes come out everywhere."""

import itertools
import json
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from lite.gguf.probes import CODE, CONTRACTIONS, DIGITS, EMOJI, SCRIPTS, SPACES

CORPUS = (*SCRIPTS, *CODE, *DIGITS, *CONTRACTIONS, *SPACES, *EMOJI)
MERGES = 180
INST = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"


def learnt_merges(words: Iterable[str], count: int) -> list[tuple[str, str]]:
    """The most frequent pair of neighbours, again and again, the greatest of equally frequent ones first."""
    counted = [(list(word), times) for word, times in Counter(words).items()]
    frequency: Counter[tuple[str, str]] = Counter()
    where: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    merges = []

    def count_pairs(i: int, sign: int) -> None:
        symbols, times = counted[i]
        for pair in itertools.pairwise(symbols):
            frequency[pair] += sign * times
            where[pair].add(i)

    for i in range(len(counted)):
        count_pairs(i, 1)
    for _ in range(count):
        left, right = max(frequency, key=lambda pair: (frequency[pair], pair))
        merges.append((left, right))
        for i in where.pop((left, right)):
            count_pairs(i, -1)
            symbols = counted[i][0]
            k = 0
            while k < len(symbols) - 1:
                if (symbols[k], symbols[k + 1]) == (left, right):
                    symbols[k : k + 2] = [left + right]
                k += 1
            count_pairs(i, 1)
    return merges


def added(content: str, i: int, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens."""
    kept = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, **kept, "special": special, **flags}


def bos_template(token: str, i: int) -> dict[str, Any]:
    """The post-processor that puts a token before every text."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}},
    }


def byte_level(
    folder: Path,
    pre_tokenizer: dict[str, Any],
    *,
    special: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    ordinary: Sequence[str] = ("<tool_call>",),
    settings: dict[str, Any],
    stops: Sequence[str] = (),
    bos: str | None = None,
    ignore_merges: bool = False,
    normalizer: dict[str, Any] | None = None,
    template: str | None = None,
    rows: int | None = None,
    model_type: str = "llama",
) -> dict[str, Any]:
    """Write a byte-level BPE's folder: tokenizer.json, tokenizer_config.json, generation_config.json, config.json.

    special, ordinary: added tokens, special or not. stops: of the generation config. bos: put before every text.
    rows: of the embedding, if more than there are tokens. Returns config.json.
    """
    shell = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    cut = Tokenizer.from_str(json.dumps(shell | {"pre_tokenizer": pre_tokenizer})).pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learnt_merges((word for text in CORPUS for word, _ in cut.pre_tokenize_str(text)), MERGES)
    letters = [*alphabet, *dict.fromkeys("".join(pair) for pair in merges)]
    vocab = {letter: i for i, letter in enumerate(letters)}
    more = [added(token, len(vocab) + i, special=i < len(special)) for i, token in enumerate([*special, *ordinary])]
    ids = {entry["content"]: entry["id"] for entry in more}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": more,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": bos_template(bos, ids[bos]) if bos else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }
    return _write(
        folder, document, settings, [ids[stop] for stop in stops], template, rows or len(vocab) + len(more), model_type
    )


def sentence_pieces(
    folder: Path,
    *,
    settings: dict[str, Any],
    begin: Sequence[str] = ("<unk>", "<s>", "</s>"),
    user_defined: Sequence[str] = (),
    special: Sequence[dict[str, Any]] = (),
    stripping: Sequence[str] = (),
    normalizer: dict[str, Any] | None = None,
    pre_tokenizer: dict[str, Any] | None = None,
    bos: str | None = "<s>",
    stops: Sequence[str] = ("</s>",),
    template: str | None = INST,
    model_type: str = "llama",
    own_model: bool = False,
    complete: bool = True,
    rows: int | None = None,
) -> dict[str, Any]:
    """Write the folder of a SentencePiece BPE with byte fallback; returns config.json.

    begin: the first tokens, all special. stripping: of them, those that take the spaces behind them. user_defined:
    pieces that are also added tokens. special: added tokens behind the pieces. own_model: tokenizer.model too.
    complete: a merge for each way to make each token, as transformers makes them out of tokenizer.model; else the one
    that was learnt.
    """
    words = [word for text in CORPUS for word in ("▁" + text.replace(" ", "▁")).replace("▁", " ▁").split(" ") if word]
    learnt = learnt_merges(words, MERGES)
    made = [*user_defined, *dict.fromkeys("".join(pair) for pair in learnt)]
    made = list(dict.fromkeys(made))
    letters = sorted({letter for word in words for letter in word if ord(letter) < 0x250} | set("".join(made)))
    texts = [*begin, *(f"<0x{byte:02X}>" for byte in range(256)), *made, *(x for x in letters if x not in made)]
    vocab = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    splits = [
        (text[:i], text[i:]) for text in made for i in range(1, len(text)) if {text[:i], text[i:]} <= vocab.keys()
    ]
    merges = splits if complete else learnt
    more = [added(token, i, rstrip=token in stripping) for i, token in enumerate(begin)]
    more += [added(piece, vocab[piece], special=False) for piece in user_defined]
    more += [entry | {"id": len(vocab) + i} for i, entry in enumerate(special)]
    ids = {entry["content"]: entry["id"] for entry in more}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": more,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": bos_template(bos, ids[bos]) if bos else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }
    if own_model:
        # As transformers 4 saved it, and published folders have it.
        settings = settings | {
            "added_tokens_decoder": {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in more}
        }
        kinds = {text: 2 if text == "<unk>" else 3 for text in begin} | dict.fromkeys(user_defined, 4)
        write_sentencepiece_model(
            folder / "tokenizer.model",
            [
                (
                    text,
                    -float(made.index(text)) if text in made else -1e9 if len(text) == 1 else 0.0,
                    6 if text.startswith("<0x") else kinds.get(text, 1),
                )
                for text in vocab
            ],
        )
    rows = rows or len(vocab) + len(special)
    return _write(folder, document, settings, [ids[stop] for stop in stops], template, rows, model_type)


def write_sentencepiece_model(path: Path, pieces: Sequence[tuple[str, float, int]], *, kind: int = 2) -> None:
    """A tokenizer.model of (text, score, type) pieces, as sentencepiece_model.proto says; kind: 1 unigram, 2 BPE."""

    def varint(value: int) -> bytes:
        made = bytearray()
        while value > 0x7F:
            made.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*made, value])

    def part(field: int, content: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(content)) + content

    body = b""
    for text, score, piece_kind in pieces:
        body += part(1, part(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(piece_kind))
    body += part(2, b"\x18" + varint(kind) + varint(35 << 3) + varint(1))  # model_type, byte_fallback
    body += part(3, part(1, b"identity") + b"\x18\x01\x20\x00\x28\x01")  # normalizer_spec
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)


def _write(
    folder: Path,
    document: dict[str, Any],
    settings: dict[str, Any],
    stops: list[int],
    template: str | None,
    rows: int,
    model_type: str,
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": model_type, "vocab_size": rows, "architectures": [f"{model_type.capitalize()}ForCausalLM"]}
    for name, content in (
        ("tokenizer.json", document),
        ("tokenizer_config.json", settings),
        ("generation_config.json", {"eos_token_id": stops} if stops else {}),
        ("config.json", config),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return config


def write_tiny_llama(path: Path, writer_of: Any, rows: int) -> None:
    """A GGUF of one layer of Llama over `rows` tokens; `writer_of` adds the vocabulary to its writer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer_of(writer)
    shapes = {"token_embd": (rows, 32), "output_norm": (32,), "output": (rows, 32)}
    layer = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), (32, 32))
    layer |= {"attn_norm": (32,), "ffn_norm": (32,)}
    for name, shape in (shapes | {f"blk.0.{name}": shape for name, shape in layer.items()}).items():
        values = np.sin(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape) / 8
        writer.add_tensor(f"{name}.weight", values + (1 if name.endswith("norm") else 0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
