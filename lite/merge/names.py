"""Names: which tensor of a checkpoint a live model's parameter is.

Mostly the same name. Of a model that also sees pictures, the live one has `model.language_model.layers.0…` where its
checkpoint has `language_model.model.layers.0…`: then the end of the name decides, if one tensor alone has it.
"""

import itertools
import re
from collections.abc import Collection

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
_SENSES = re.compile(r"vision|visual|audio|image")
_EMBEDDING_END = re.compile(r"(?:(?<=\.)|^)(?:model\.)?(?:language_model\.)?embed_tokens\.weight$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def place(live: str, names: Collection[str]) -> str | None:
    """The name in `names` of the live model's parameter, or None if there is none, or no single one.

    It has the longest common end, which holds the number of the layer, or else the last two parts.
    """
    if live in names:
        return live
    parts = live.split(".")
    least = len(parts) - parts.index("layers") if "layers" in parts else 2
    found: dict[int, list[str]] = {}
    for name in names:
        # Towers of other senses have layers of the same names.
        if bool(_SENSES.search(name)) == bool(_SENSES.search(live)):
            found.setdefault(_common_end(parts, name.split(".")), []).append(name)
    longest = max(found, default=0)
    return found[longest][0] if longest >= least and len(found[longest]) == 1 else None


def _common_end(one: list[str], other: list[str]) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def tied_head(embedding: str) -> str:
    """The name that a head of its own has in the checkpoint of this embedding."""
    return _EMBEDDING_END.sub(HEAD, embedding)


def tied_embedding(head: str, names: Collection[str]) -> str:
    """The name that the embedding has in a checkpoint of these names that holds the head alone.

    Beside the layers, which some checkpoints have without `model.` before them.
    """
    stem = head.removesuffix(HEAD)
    bare = any(name.startswith(f"{stem}layers.") for name in names)
    return f"{stem}{'' if bare else 'model.'}{EMBEDDING}"


def layer(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None outside the text model's layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match and not _SENSES.search(name) else None
