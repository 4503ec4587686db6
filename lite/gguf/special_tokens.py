"""The special tokens in a GGUF file: what begins and ends a text, what ends an answer, the chat template.

llama.cpp stops at the tokens whose text it knows (`KNOWN_ENDS`) and at those that the file names as EOS, EOT or EOM.
Every token with which the model was trained to end an answer must be among them.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf

from lite.data.problems import BadRow
from lite.data.template import QUESTION, render
from lite.errors import ExportError
from lite.gguf.tokenizer import TrainedTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Source: llama.cpp, src/llama-vocab.cpp, special_eog_ids.
KNOWN_ENDS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
    )
)
# The keys of a file that make a token an end. FIM_PAD has another meaning, but only for filling in the middle.
END_SLOTS = ("eos", "eot", "eom", "fim_pad")
PHI3_TOKENS = frozenset(("<unk>", "<s>", "</s>", "<|endoftext|>"))
STOPS_KEY = "tokenizer.ggml.eos_token_ids"


def looks_special(token: str) -> bool:
    """Whether llama.cpp's converter takes an added token as a control token though it is not marked as special."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<｜") and token.endswith("｜>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )


def strips_spaces(added: Iterable[Mapping[str, Any]]) -> bool:
    """Whether llama.cpp has to take this for a Phi-3, whose special tokens take the white space behind them.

    added: added_tokens of tokenizer.json. llama.cpp goes by the model's name, and aborts where one of `PHI3_TOKENS` is
    not there.
    """
    added = list(added)
    return any(entry["special"] and entry["rstrip"] for entry in added) and (
        {entry["content"] for entry in added} >= PHI3_TOKENS
    )


def fitting_name(name: str, files: Path) -> str:
    """The model's name (general.name), so that llama.cpp takes it for a Phi-3 if it has to, and only then."""
    document = json.loads((files / "tokenizer.json").read_text(encoding="utf-8"))
    phi3 = re.search("phi-?3", name, re.IGNORECASE) is not None
    if strips_spaces(document.get("added_tokens") or ()):
        return name if phi3 else f"{name} (Phi-3)"
    return re.sub("(phi)-?(3)", r"\1 \2", name, flags=re.IGNORECASE)


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether llama.cpp has to put BOS before every prompt: the tokenizer does so, and no chat goes without.

    Training takes a rendered chat as it is, and llama.cpp has one flag for chats and plain text: of a tokenizer that
    begins a text with BOS, while its chat template does not print it, the chats are right and plain text has no BOS.
    """
    if tokenizer.bos_token_id is None or tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return False
    if not tokenizer.chat_template:
        return True
    try:
        chat = render(tokenizer, tokenizer.get_chat_template(), QUESTION, generation_prompt=True)
    except (BadRow, ValueError):  # a template that nobody can talk through, or several and no default
        return True
    return chat.startswith(tokenizer.bos_token)


def add_special_tokens(
    writer: gguf.GGUFWriter,
    tokenizer: TrainedTokenizer,
    config: Mapping[str, Any],
    tokens: Sequence[str],
    stops: Sequence[int],
) -> None:
    """Add the merges (of a byte-level BPE), ids and flags of special tokens, and the chat template.

    tokens: texts by id, as the file has them. stops: ids that end an answer, at least one.
    Raises ExportError where a stop token cannot be made one in llama.cpp, or other tokens than BOS and EOS stand around
    every text.
    """
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of what is read anew below
    by_merges = not tokenizer.document["model"].get("byte_fallback")
    special = gguf.SpecialVocab(tokenizer.files, load_merges=by_merges, n_vocab=len(tokens))
    ids, flags = special.special_token_ids, special.add_special_token
    for kind in special.special_token_types:
        if isinstance(found := config.get(f"{kind}_token_id"), int):
            ids.setdefault(kind, found)
    _surround(tokenizer, ids, flags)
    _make_stops(stops, ids, tokens)
    special.chat_template = _chat_template(tokenizer)
    if (fim_pad := ids.pop("fim_pad", None)) is not None:
        writer.add_uint32(gguf.Keys.Tokenizer.FIM_PAD_ID, fim_pad)  # gguf has no method for it
    special.add_to_gguf(writer, quiet=True)
    if len(stops) > 1 or stops[0] != ids["eos"]:
        # llama.cpp does not read it; Ollama's own engine does, and stops at nothing else but eos_token_id.
        writer.add_array(STOPS_KEY, list(stops))


def _surround(tokenizer: TrainedTokenizer, ids: dict[str, int], flags: dict[str, bool]) -> None:
    """Let the flags say what the tokenizer really puts around a text, but for BOS that its chats go without.

    That of BOS is always written: without, llama.cpp and Ollama each have a default of their own for each kind of
    tokenizer.
    """
    before, after = tokenizer.surroundings()
    for kind, found in (("bos", before), ("eos", after)):
        if len(found) > 1 or (found and found[0] != ids.setdefault(kind, found[0])):
            raise ExportError(
                f"{tokenizer.files}: the tokenizer puts {tokenizer.tokenizer.convert_ids_to_tokens(found)} "
                f"{'before' if kind == 'bos' else 'after'} every text; llama.cpp can put one {kind.upper()} token "
                f"there, which is {ids.get(kind)}. Its model cannot be written as GGUF."
            )
        if kind == "bos" or found or kind in flags:
            flags[kind] = bool(found) and (kind == "eos" or adds_bos(tokenizer.tokenizer))


def _make_stops(stops: Sequence[int], ids: dict[str, int], tokens: Sequence[str]) -> None:
    """Give the stop tokens that llama.cpp would not know the ids that are free."""
    outside = [stop for stop in stops if not 0 <= stop < len(tokens)]
    if outside:
        raise ExportError(
            f"The tokens that end an answer are {list(stops)}, and the model has {len(tokens)}: {outside} are none of "
            "them. Mend eos_token_id in generation_config.json."
        )
    undone = _taken_back(tokens)
    lost = [tokens[stop] for stop in stops if tokens[stop] in undone]
    missing = [
        stop for stop in stops if tokens[stop] not in KNOWN_ENDS and stop not in [ids.get(slot) for slot in END_SLOTS]
    ]
    for slot in END_SLOTS:
        if missing and slot not in ids:
            ids[slot] = missing.pop(0)
    ids.setdefault("eos", stops[0])
    lost += [tokens[stop] for stop in missing]
    if lost:
        raise ExportError(
            f"llama.cpp would not stop at {lost}, with which this model was trained to end an answer: it stops at "
            f"{len(END_SLOTS)} tokens of a file's choice and at those it knows by their text.\n"
            "Take stop tokens out of eos_token_id in generation_config.json, or serve the merged folder instead."
        )


def _taken_back(tokens: Sequence[str]) -> set[str]:
    """Ends that llama.cpp takes back again where the others here are in the vocabulary."""
    there = {token for token in tokens if token in KNOWN_ENDS or token == "<|plamo:eos|>"}
    undone = set()
    if {"<|return|>", "<|call|>"} <= there or ({"<|call|>", "<|calls|>"} & there and "<|flush|>" in there):
        undone.add("<|end|>")
    if {"<|tool_response>", "<|plamo:eos|>"} & there:
        undone.add("</s>")
    return undone


def _chat_template(tokenizer: TrainedTokenizer) -> str | list[dict[str, str]] | None:
    template = tokenizer.tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template
