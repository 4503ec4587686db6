"""The tokenizer in a GGUF file: tokens, their types, scores or merges, and what stands around a text.

Two kinds can be written: byte-level BPE (llama.cpp's "gpt2": merges, and words cut as `pre_tokenizers` finds out) and
SentencePiece's BPE with byte fallback ("llama": a score for each token, the best pair is merged first).
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from tokenizers import Tokenizer

from lite.errors import ExportError, raise_collected
from lite.gguf import pre_tokenizers
from lite.gguf import space_prefix as space_prefixes
from lite.gguf.probes import special_probes
from lite.gguf.sentence_pieces import SpmTokenizer, scored_pieces
from lite.gguf.special_tokens import add_special_tokens, looks_special, strips_spaces
from lite.gguf.tokenizer import TrainedTokenizer, read_tokenizer

log = logging.getLogger(__name__)

# Model types whose `add_prefix_space` of tokenizer_config.json llama.cpp's converter writes as it is.
LLAMA_TYPES = ("llama", "mistral", "mixtral")
# The chat template of a model without: to a file that has none llama.cpp talks in ChatML, which such a model never saw.
PLAIN_TEXT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of the tokens, id by id."""

    kind: str  # tokenizer.ggml.model: gpt2 or llama
    pre: str  # tokenizer.ggml.pre
    tokens: list[str]
    types: list[int]  # gguf.TokenType
    scores: list[float] | None  # of "llama" alone
    probes: tuple[str, ...]  # strings that llama.cpp makes the same ids of as the tokenizer that was trained with
    space_prefix: bool = False  # whether a text, and what follows a special token, begins as if after a space


def add_vocabulary(
    writer: gguf.GGUFWriter, files: Path, config: Mapping[str, Any], *, stops: Sequence[int]
) -> tuple[str, ...]:
    """Add all `tokenizer.*` keys: the tokenizer of the folder `files`, its special and stop tokens, its chat template.

    files: folder with tokenizer.json, tokenizer_config.json and, if the model has one, its tokenizer.model. config: the
    model's config.json; there are as many tokens as its vocab_size. stops: ids that end an answer, at least one.
    The keys and values are those of llama.cpp's converter, except where these would make another tokenizer of it than
    was trained with; tests/gguf/test_vocabulary.py names each.
    Returns strings of which llama.cpp, with the file, and the tokenizer that was trained with make the same ids:
    `PROBES`, less those that llama.cpp is known to cut otherwise whatever the file says (of which a warning is logged),
    and strings around the special tokens.
    Raises ExportError for a tokenizer that llama.cpp has no way to be: another model than BPE, a normalizer, an unknown
    pre-tokenizer, more stop tokens than a file can say.
    """
    tokenizer = read_tokenizer(files)
    vocabulary = vocabulary_of(tokenizer, config["vocab_size"], model_type=config.get("model_type", ""))
    _refuse_twins(vocabulary)
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    prefix = tokenizer.settings.get("add_prefix_space") if config.get("model_type") in LLAMA_TYPES else None
    if vocabulary.kind == "llama" and (prefix is not None or not vocabulary.space_prefix):
        prefix = vocabulary.space_prefix
    if prefix is not None:
        writer.add_add_space_prefix(prefix)
    add_special_tokens(writer, tokenizer, config, vocabulary.tokens, stops)
    if not tokenizer.tokenizer.chat_template:
        writer.add_chat_template(PLAIN_TEXT)
    return vocabulary.probes


def vocabulary_of(tokenizer: TrainedTokenizer, rows: int, *, model_type: str) -> Vocabulary:
    """The tokens of a model with `rows` rows of embedding. Raises ExportError as `add_vocabulary` says."""
    model = tokenizer.document["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"{tokenizer.files}: the tokenizer is of the kind {model['type']}; byte-level BPE and SentencePiece's BPE "
            f"with byte fallback are known. The pair of {model_type or 'this architecture'} and {model['type']} cannot "
            "be written as GGUF."
        )
    _refuse_beyond(tokenizer, rows)
    if model.get("byte_fallback"):
        tokens, scores, types = scored_pieces(tokenizer, rows)
        _place_added(tokenizer, tokens, types, scores, phi3=model_type == "phi3")
        prefix, probes = space_prefixes.space_prefix(tokenizer)
        llama = SpmTokenizer(tokens, scores, types, space_prefix=prefix, strips=strips_spaces(tokenizer.added.values()))
        probes = space_prefixes.same_in_llama(tokenizer, llama, probes)
        return Vocabulary("llama", "default", tokens, types, scores, probes, space_prefix=prefix)
    if '"ByteLevel"' not in json.dumps(tokenizer.document["pre_tokenizer"]):
        raise ExportError(
            f"{tokenizer.files}: the tokenizer is a BPE over neither bytes (ByteLevel) nor characters with byte "
            "fallback; llama.cpp knows these two. Its model cannot be written as GGUF."
        )
    way = pre_tokenizers.way_of(tokenizer.document, whole_tokens=lambda: _tokens_are_whole(tokenizer))
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, i in tokenizer.pieces.items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
    _place_added(tokenizer, tokens, types, None)
    if way.really:
        log.warning("llama.cpp cuts words with accented capitals or combining marks otherwise than this tokenizer does")
    wide = [entry["content"] for entry in tokenizer.added.values() if entry["lstrip"] or entry["rstrip"]]
    if wide:
        log.warning(
            "llama.cpp leaves the spaces beside %s, which belong to them in this tokenizer", ", ".join(wide[:9])
        )
    around = [
        entry["content"] for entry in tokenizer.added.values() if entry["special"] and entry["content"] not in wide
    ]
    probes = (*pre_tokenizers.same_in_llama(way, tokenizer.document), *special_probes(around))
    return Vocabulary("gpt2", way.name, tokens, types, None, probes)


def _place_added(
    tokenizer: TrainedTokenizer, tokens: list[str], types: list[int], scores: list[float] | None, *, phi3: bool = False
) -> None:
    """Put the added tokens in their places; llama.cpp looks for them in the text before it is cut.

    phi3: its tokens are taken as they are, whatever they look like, as llama.cpp's converter has it for Phi-3.
    """
    for i, entry in tokenizer.added.items():
        if i >= len(tokens):
            continue
        token = entry["content"]
        if scores is None and not entry["normalized"]:
            # llama.cpp looks for it in the text as it comes: what the text looks like that makes this token.
            token = tokenizer.tokenizer.decode(tokenizer.tokenizer.encode(token, add_special_tokens=False))
        if entry["special"] or (not phi3 and looks_special(token)):
            types[i] = int(TokenType.CONTROL)
        else:
            token = token if phi3 else token.replace("▁", " ")
            types[i] = int(TokenType.USER_DEFINED)
        tokens[i] = token
        if scores is not None:
            scores[i] = -1000.0


def _tokens_are_whole(tokenizer: TrainedTokenizer) -> bool:
    """Whether merging the letters of each token makes that token."""
    merging = tokenizer.document["model"] | {"ignore_merges": False}
    model = Tokenizer.from_str(json.dumps(tokenizer.document | {"model": merging})).model
    added = tokenizer.added
    return all(len(model.tokenize(token)) == 1 for token, i in tokenizer.pieces.items() if i not in added)


def _refuse_beyond(tokenizer: TrainedTokenizer, rows: int) -> None:
    beyond = {token: i for token, i in tokenizer.pieces.items() if i >= rows}
    raise_collected(
        ExportError,
        f"{tokenizer.files}: {len(beyond)} tokens have no row in the embedding, which has {rows}:",
        [f"{i}: {token!r}" for token, i in sorted(beyond.items(), key=lambda item: item[1])],
        "Take the tokenizer that the model was trained with, or resize the embedding (resize_token_embeddings).",
    )


def _refuse_twins(vocabulary: Vocabulary) -> None:
    """llama.cpp aborts on a file with the same text for two tokens."""
    counts = Counter(vocabulary.tokens)
    twins = [token for token, count in counts.items() if count > 1]
    raise_collected(
        ExportError,
        "llama.cpp cannot have two tokens of the same text, and in this tokenizer there are:",
        [f"{token!r}: ids {[i for i, text in enumerate(vocabulary.tokens) if text == token]}" for token in twins],
        "Its model cannot be written as GGUF.",
    )
