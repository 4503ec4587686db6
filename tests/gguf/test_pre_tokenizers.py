"""Which of llama.cpp's ways to cut words a tokenizer has: told by what it cuts, however its regex is written."""

import itertools
import json
import unicodedata
from typing import Any

import pytest

from lite.errors import ExportError
from lite.gguf.pre_tokenizers import ASCII_CONTRACTIONS, CONTRACTIONS, QWEN2, WAYS, cuts, way_json, way_of
from lite.gguf.probes import PROBES, special_probes

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES_ALONE = BYTE_LEVEL | {"use_regex": False}


def document(pre_tokenizer: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {"normalizer": None, "pre_tokenizer": pre_tokenizer, "model": {"type": "BPE", **model}}


def split(regex: str, behavior: str = "Isolated", *, invert: bool = False) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}
    return {"type": "Sequence", "pretokenizers": [cut, BYTES_ALONE]}


def named(pre_tokenizer: dict[str, Any], **model: Any) -> str:
    return way_of(document(pre_tokenizer, **model), whole_tokens=lambda: False).name


def test_the_strings_tell_every_way_from_every_other():
    """Two ways with the same words are the same regexes, and differ in ignore_merges."""
    words = {way.name: cuts(json.dumps(way_json(way))) for way in WAYS}
    for one, other in itertools.combinations(WAYS, 2):
        same = words[one.name] == words[other.name]
        assert same == (one.regexes == other.regexes), (one.name, other.name)
        assert not same or one.ignore_merges != other.ignore_merges


def test_each_way_is_found_by_its_own_words():
    for way in WAYS:
        assert named(way_json(way), ignore_merges=way.ignore_merges) == way.name


def test_the_same_regex_in_other_words():
    """As the tokenizers of published models write them: possessive, spelled out, inverted, in steps."""
    spelled_out = QWEN2.replace(CONTRACTIONS, ASCII_CONTRACTIONS)
    possessive = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
        r"\s+(?!\S)|\s+"
    )
    digits = {"type": "Digits", "individual_digits": True}
    assert named(BYTE_LEVEL) == "gpt-2"
    assert named(split(QWEN2)) == named(split(spelled_out)) == named(split(QWEN2, "Removed", invert=True)) == "qwen2"
    assert named(split(possessive)) == "dbrx"
    assert named(split(possessive), ignore_merges=True) == "llama-bpe"
    assert named({"type": "Sequence", "pretokenizers": [digits, BYTE_LEVEL]}) == "smollm"


def test_an_unknown_way_is_refused_with_what_the_nearest_cuts_otherwise():
    """Digits in pairs: nothing in llama.cpp does so. In threes is nearest, and three are the fewest that show it."""
    with pytest.raises(
        ExportError, match=r"The nearest, llama-bpe, cuts \d+ of \d+ strings otherwise, '333' for one"
    ) as error:
        way_of(document(split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,2}|"))), whole_tokens=lambda: True)
    assert "llama-bpe: ['333']" in str(error.value)
    assert "the tokenizer: ['33', '3']" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalises text by Lowercase"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}}, "by NFKC before"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "adds a space before every text"),
        ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}, "end_of_word_suffix = '</w>'"),
    ],
)
def test_what_llama_cpp_has_not_is_refused(changes: dict[str, Any], words: str):
    with pytest.raises(ExportError, match=words):
        way_of(document(BYTE_LEVEL) | changes, whole_tokens=lambda: True)


def test_nfc_is_let_through():
    assert way_of(document(BYTE_LEVEL) | {"normalizer": {"type": "NFC"}}, whole_tokens=lambda: True).name == "gpt-2"


def test_ignore_merges_matters_only_if_a_token_is_not_made_by_its_merges():
    """gpt-2's words are known in llama.cpp without ignore_merges alone."""
    asked = document(BYTE_LEVEL, ignore_merges=True)
    assert way_of(asked, whole_tokens=lambda: True).name == "gpt-2"
    with pytest.raises(ExportError, match="ignore_merges = True, there it is False"):
        way_of(asked, whole_tokens=lambda: False)


def test_the_strings_are_many_distinct_and_nfc():
    assert len(set(PROBES)) == len(PROBES) > 300
    assert all(unicodedata.normalize("NFC", probe) == probe for probe in PROBES)
    assert "a<x>b" in special_probes(["<x>"])
