"""How a text is cut into words before byte-level BPE merges inside them: which of llama.cpp's ways a tokenizer has.

A GGUF file names the way (`tokenizer.ggml.pre`) and llama.cpp has its regexes by that name, so a tokenizer can be
written only if one of them cuts as it does. tokenizer.json may write the same regex in many ways, so the cuts are
compared, on `PROBES`: an equal cut of them all is what "the same" means here.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import PreTokenizer

from lite.errors import ExportError
from lite.gguf.probes import PROBES

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ASCII_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # the other also takes ſ for an s
LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + LINES
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + LINES
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s|"
# llama.cpp's regexes know the case of ASCII letters only, and no marks among letters.
ASCII_CASED = r"[^\r\n\p{L}\p{N}]?(?:(?![a-z])\p{L})*(?:(?![A-Z])\p{L})+%s|"
ASCII_CASED += r"[^\r\n\p{L}\p{N}]?(?:(?![a-z])\p{L})+(?:(?![A-Z])\p{L})*%s|"
TEKKEN_REST = r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + LINES
GPT4O_REST = TEKKEN_REST.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
BARE, CONTRACTED = ("", ""), (CONTRACTIONS + "?", CONTRACTIONS + "?")
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
)
DEEPSEEK3 += LINES
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
LATIN = (
    "A-Za-z"
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class Way:
    """One of llama.cpp's ways to cut, under the first of its names for it: each regex cuts what the last one left."""

    name: str  # as tokenizer.ggml.pre says it
    regexes: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token stays whole, whatever its merges say
    really: tuple[str, ...] = ()  # how llama.cpp cuts, where it falls short of the regexes


# Source: llama.cpp, src/llama-vocab.cpp; `regexes` are those of the tokenizer.json that the name stands for. Several
# names cut alike there; the first one here is taken, by `ignore_merges`. Left out: ways that no architecture lite
# writes has been seen with.
WAYS = (
    Way("qwen2", (QWEN2,)),
    Way("llama-bpe", (LLAMA3,), ignore_merges=True),
    Way("dbrx", (LLAMA3,)),
    Way("gpt-2", (GPT2,)),
    Way("smollm", (r"\p{N}", GPT2)),
    Way("tekken", (CASED % BARE + TEKKEN_REST,), ignore_merges=True, really=(ASCII_CASED % BARE + TEKKEN_REST,)),
    Way("gpt-4o", (CASED % CONTRACTED + GPT4O_REST,), really=(ASCII_CASED % CONTRACTED + GPT4O_REST,)),
    Way(
        "qwen35",
        (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + LINES,),
    ),
    Way("ufakzeka", (QWEN2.removeprefix(CONTRACTIONS + "|"),)),
    Way("deepseek-v3", (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK3)),
    Way(
        "deepseek-llm",
        (
            r"[\r\n]",
            rf"\s?[{LATIN}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            CJK,
            r"\p{N}+",
        ),
    ),
    Way("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}")),
    Way("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    Way("bloom", (BLOOM,)),
    Way("viking", (BLOOM, r"\p{N}")),
    Way(
        "seed-coder",
        (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + LINES,),
    ),
    Way("default", (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
)


def way_of(document: Mapping[str, Any], *, whole_tokens: Callable[[], bool]) -> Way:
    """The way that cuts as the pre-tokenizer of a tokenizer.json does.

    document: the parsed tokenizer.json of a byte-level BPE. whole_tokens: tells whether its merges make every
    token of the vocabulary from its bytes, so that `ignore_merges` changes nothing; asked only if it matters.
    Raises ExportError with the string that the nearest way cuts otherwise, or for what no way of llama.cpp does.
    """
    _refuse_unknown(document)
    words = cuts(json.dumps(document["pre_tokenizer"]))
    ignores = bool(document["model"].get("ignore_merges"))
    alike = [way for way in WAYS if words in (_cuts_of(way), _cuts_in_llama(way))]
    if not alike:
        raise ExportError(_no_way(words))
    fitting = [way for way in alike if way.ignore_merges == ignores] or (alike if whole_tokens() else [])
    if not fitting:
        raise ExportError(
            f"The tokenizer cuts words as {alike[0].name} does in llama.cpp, but has ignore_merges = {ignores}, there "
            f"it is {alike[0].ignore_merges}, and some of its tokens are not made by its merges.\n"
            "Such a tokenizer cannot be written as GGUF: llama.cpp would give other tokens."
        )
    return fitting[0]


def cuts(pre_tokenizer: str) -> list[tuple[str, ...]]:
    """The words of each of `PROBES` by a pre-tokenizer, given as the JSON of tokenizer.json; byte-level letters."""
    shell = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    made: PreTokenizer = Tokenizer.from_str(
        json.dumps(shell | {"pre_tokenizer": json.loads(pre_tokenizer)})
    ).pre_tokenizer
    return [tuple(word for word, _ in made.pre_tokenize_str(probe)) for probe in PROBES]


def same_in_llama(way: Way, document: Mapping[str, Any]) -> tuple[str, ...]:
    """The strings of `PROBES` that llama.cpp cuts as the pre-tokenizer of a tokenizer.json does."""
    words = cuts(json.dumps(document["pre_tokenizer"]))
    return tuple(probe for probe, there, here in zip(PROBES, _cuts_in_llama(way), words, strict=True) if there == here)


def way_json(way: Way) -> dict[str, Any]:
    """The pre-tokenizer of tokenizer.json that cuts as a way does."""
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} for regex in way.regexes
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, byte_level]}


@functools.cache
def _cuts_of(way: Way) -> list[tuple[str, ...]]:
    return cuts(json.dumps(way_json(way)))


@functools.cache
def _cuts_in_llama(way: Way) -> list[tuple[str, ...]]:
    regexes = tuple(regex.replace(CONTRACTIONS, ASCII_CONTRACTIONS) for regex in way.really or way.regexes)
    return cuts(json.dumps(way_json(replace(way, regexes=regexes))))


def _refuse_unknown(document: Mapping[str, Any]) -> None:
    """Raise ExportError for a normalizer, or an option of the BPE, that llama.cpp does not have."""
    normalizer = document.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    foreign = [step["type"] for step in steps if step["type"] != "NFC"]
    if foreign:
        raise ExportError(
            f"The tokenizer normalises text by {', '.join(foreign)} before byte-level BPE; llama.cpp normalises "
            "nothing, and a tokenizer with NFC or none is expected.\nIts model cannot be written as GGUF."
        )
    model = document["model"]
    options = [
        f"{name} = {model[name]!r}"
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
        if model.get(name)
    ]
    if options:
        raise ExportError(
            f"The tokenizer's BPE has {', '.join(options)}; llama.cpp has no such thing: it cannot be written."
        )
    if '"add_prefix_space": true' in json.dumps(document["pre_tokenizer"]):
        raise ExportError(
            "The tokenizer adds a space before every text (add_prefix_space of ByteLevel); llama.cpp does so for "
            "SentencePiece alone: it cannot be written as GGUF."
        )


def _no_way(words: list[tuple[str, ...]]) -> str:
    differing = {
        way: [i for i, pair in enumerate(zip(_cuts_of(way), words, strict=True)) if pair[0] != pair[1]] for way in WAYS
    }
    nearest = min(WAYS, key=lambda way: len(differing[way]))
    first = min(differing[nearest], key=lambda i: len(PROBES[i]))
    return (
        f"No pre-tokenizer of llama.cpp cuts text as this tokenizer does. The nearest, {nearest.name}, cuts "
        f"{len(differing[nearest])} of {len(PROBES)} strings otherwise, {PROBES[first]!r} for one:\n"
        f"  {nearest.name}: {list(_cuts_of(nearest)[first])}\n  the tokenizer: {list(words[first])}\n"
        "Its model cannot be written as GGUF; `--to safetensors` can."
    )
