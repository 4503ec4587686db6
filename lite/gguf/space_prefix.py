"""Whether SentencePiece's text begins as if after a space, and the proof that llama.cpp then makes the same ids.

llama.cpp has one switch for the begin of a text and for what follows a special token. transformers' tokenizers may put
the space in both places, in none, or before the text only ("first"). For the last no setting is right in both places:
chats begin with a special token, so a tokenizer with a chat template that does is written without the space.
"""

import logging
from collections.abc import Sequence

from lite.errors import ExportError
from lite.gguf.probes import PROBES, special_probes
from lite.gguf.sentence_pieces import SpmTokenizer
from lite.gguf.tokenizer import TrainedTokenizer

# Of all probes: with Gemma, runs of more than 31 spaces, which llama.cpp cuts from the left.
TOLERATED = 0.02

log = logging.getLogger(__name__)


def space_prefix(tokenizer: TrainedTokenizer) -> tuple[bool, tuple[str, ...]]:
    """The switch (tokenizer.ggml.add_space_prefix), and the strings on which the two agree with it.

    The strings are `PROBES`; if the space is left away though the tokenizer puts it before a text, each of them follows
    a special token.
    """
    first = _begins_with_space(tokenizer, _ids(tokenizer, "a"))
    special = _special_text(tokenizer)
    after = _begins_with_space(tokenizer, _ids(tokenizer, f"{special}a")[1:]) if special else first
    if first == after:
        return first, _same_probes(tokenizer, first)
    if not first or not _chat_begins_special(tokenizer):
        log.warning("llama.cpp begins what follows a special token otherwise than this tokenizer, by a space")
        return first, _same_probes(tokenizer, first)
    log.warning("llama.cpp begins a text without the space that this tokenizer puts there; chats are the same")
    return False, tuple(special + probe for probe in PROBES)


def _same_probes(tokenizer: TrainedTokenizer, first: bool) -> tuple[str, ...]:
    """All but those that begin with a space, if that keeps the tokenizer from putting one there.

    transformers 5 does so; sentencepiece, transformers 4 and llama.cpp begin them with two.
    """
    if first and len("".join(tokenizer.tokenizer.convert_ids_to_tokens(_ids(tokenizer, " a")))) == 2:
        return tuple(probe for probe in PROBES if not probe.startswith(" "))
    return PROBES


def same_in_llama(tokenizer: TrainedTokenizer, llama: SpmTokenizer, probes: Sequence[str]) -> tuple[str, ...]:
    """The strings that llama.cpp makes the same ids of, strings around special tokens among them.

    Raises ExportError with the shortest that it does not, if more than `TOLERATED` are not; warns of it if fewer.
    """
    differing = [probe for probe in probes if _ids(tokenizer, probe) != llama.ids(probe)]
    if differing:
        probe = min(differing, key=len)
        ours = tokenizer.tokenizer.convert_ids_to_tokens(_ids(tokenizer, probe))
        theirs = tokenizer.tokenizer.convert_ids_to_tokens(llama.ids(probe))
        shown = (
            f"{len(differing)} of {len(probes)} strings become other tokens, {probe!r} for one:\n"
            f"  llama.cpp: {theirs}\n  the tokenizer: {ours}"
        )
        if len(differing) > TOLERATED * len(probes):
            raise ExportError(
                f"{tokenizer.files}: llama.cpp cannot do as this tokenizer does: {shown}\nIt merges by a score for "
                "each token, and knows no normalizer but the one that makes spaces of \u2581."
            )
        log.warning("in llama.cpp %s", shown)
    special = special_probes(entry["content"] for entry in tokenizer.added.values() if entry["special"])
    return tuple(probe for probe in (*probes, *special) if _ids(tokenizer, probe) == llama.ids(probe))


def _ids(tokenizer: TrainedTokenizer, text: str) -> list[int]:
    return tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]


def _special_text(tokenizer: TrainedTokenizer) -> str:
    """The text of a special token that takes nothing from what is beside it: BOS, if it is one."""
    plain = [
        entry["content"]
        for i, entry in tokenizer.added.items()
        if entry["special"] and not entry["rstrip"] and _ids(tokenizer, entry["content"]) == [i]
    ]
    return tokenizer.tokenizer.bos_token if tokenizer.tokenizer.bos_token in plain else (plain or [""])[0]


def _begins_with_space(tokenizer: TrainedTokenizer, ids: list[int]) -> bool:
    return "".join(tokenizer.tokenizer.convert_ids_to_tokens(ids)).startswith("\u2581")


def _chat_begins_special(tokenizer: TrainedTokenizer) -> bool:
    if not tokenizer.tokenizer.chat_template:
        return False
    chat = tokenizer.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    return any(chat.startswith(entry["content"]) for entry in tokenizer.added.values())
