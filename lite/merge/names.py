"""Names: which tensor of a checkpoint a live model's parameter is.

Mostly the same name. Of a model that also sees pictures, the live one has `model.language_model.layers.0…` where its
checkpoint has `language_model.model.layers.0…`: then the end of the name decides, if one tensor alone has it.
"""

import re
from collections.abc import Collection

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
_SENSES = re.compile(r"vision|visual|audio|image")


def place(live: str, names: Collection[str]) -> str | None:
    """The name in `names` of the live model's parameter, or None if there is none, or no single one."""
    if live in names:
        return live
    layers = re.search(r"(?:^|\.)(layers\.\d+\..*)$", live)
    end = layers[1] if layers else ".".join(live.rsplit(".", 2)[-2:])
    found = [name for name in names if name == end or name.endswith(f".{end}")]
    # Towers of other senses have layers of the same names.
    found = [name for name in found if bool(_SENSES.search(name)) == bool(_SENSES.search(live))]
    return found[0] if len(found) == 1 else None


def tied_head(embedding: str) -> str:
    """The name that a head of its own has in the checkpoint of this embedding."""
    return re.sub(r"(?:(?<=\.)|^)model\.(?:language_model\.)?embed_tokens\.weight$", HEAD, embedding)


def tied_embedding(head: str) -> str:
    """The name that the embedding has in a checkpoint that holds the head alone."""
    return f"{head.removesuffix(HEAD)}model.{EMBEDDING}"
