"""What config.json may ask for that llama.cpp does not do: a file of it would answer otherwise, so it is refused."""

from collections.abc import Iterator

from lite.gguf.architectures.architecture import Config
from lite.gguf.architectures.numbers import rope

ROPES = ("default", "linear", "yarn")  # that any family may have


def rope_type(config: Config, *more: str) -> Iterator[str]:
    """Rotary embeddings that are stretched in a way unknown to it."""
    known = (*ROPES, *more)
    if rope(config)["rope_type"] not in known:
        yield f"rope_type {rope(config)['rope_type']!r}; known for it: {', '.join(known)}"


def setting(config: Config, name: str, *allowed: object) -> Iterator[str]:
    """A setting that has one meaning there."""
    if config.get(name) not in (None, *allowed):
        yield f"{name} {config[name]!r}; llama.cpp computes with {' or '.join(map(repr, allowed))}"


def sliding(config: Config) -> Iterator[str]:
    """Layers with sliding attention, in a family that has none there."""
    if "sliding_attention" in (config.get("layer_types") or ()):
        yield "sliding attention (use_sliding_window), which llama.cpp has not for this architecture"
