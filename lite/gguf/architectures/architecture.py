"""Architecture: what a family of models must tell, for its checkpoints to become files of llama.cpp."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf

from lite.gguf.planned import Planned

Config = Mapping[str, Any]  # config.json with every default filled in; of a model with images, its text's on top


@dataclass(frozen=True)
class Architecture:
    """A family of models that llama.cpp runs by the same code."""

    name: str  # general.architecture
    classes: tuple[str, ...]  # as config.json's `architectures` names them
    # Every tensor of the file, given config.json and the names that the checkpoint has. What the file holds twice or
    # by other names is chosen by those.
    tensors: Callable[[Config, frozenset[str]], Iterable[Planned]]
    numbers: Callable[[gguf.GGUFWriter, Config], None]  # adds the keys of the architecture
    # What config.json asks for that llama.cpp does not do: a line each.
    refuses: Callable[[Config], Iterable[str]]
    # What of the model llama.cpp does otherwise in some texts only: a line each, said and not refused.
    notes: Callable[[Config], Iterable[str]] = lambda _: ()
    own_head: bool = True  # whether the file may hold a head that is not the embedding
