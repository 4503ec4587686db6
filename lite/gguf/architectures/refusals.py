"""What config.json may ask for that llama.cpp does not do: a file of it would answer otherwise.

It is refused; what is otherwise in long texts alone is said.
"""

from collections.abc import Iterator

from lite.gguf.architectures.architecture import Config
from lite.gguf.architectures.numbers import rope

ROPES = ("default", "linear", "yarn")  # that any family may have
# What a file may say of YaRN, and llama.cpp reads of none of the families here: it has transformers' defaults.
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


def rope_type(config: Config, *more: str) -> Iterator[str]:
    """Rotary embeddings that are stretched in a way unknown to it."""
    known = (*ROPES, *more)
    turn = rope(config)
    if turn["rope_type"] not in known:
        yield f"rope_type {turn['rope_type']!r}; known for it: {', '.join(known)}"
    if turn["rope_type"] == "yarn":
        for name, only in YARN.items():
            if turn.get(name) not in (None, only):
                yield f"{name} {turn[name]!r} of YaRN; llama.cpp computes with {only!r}"


def setting(config: Config, name: str, *allowed: object) -> Iterator[str]:
    """A setting that has one meaning there."""
    if config.get(name) not in (None, *allowed):
        yield f"{name} {config[name]!r}; llama.cpp computes with {' or '.join(map(repr, allowed))}"


def window(config: Config) -> Iterator[str]:
    """A note: sliding attention, in a family that has none there."""
    kinds = config.get("layer_types") or ["sliding_attention"]  # Mistral's and Phi-3's slide in every layer
    size = config.get("sliding_window")
    if size and "sliding_attention" in kinds and size < config["max_position_embeddings"]:
        yield f"beyond {size:,} tokens this model attends to the last {size:,} alone, and in llama.cpp to all"
