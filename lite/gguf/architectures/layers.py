"""What layers of transformers are made of: names in the checkpoint, names in the file, shapes.

Sizes, by letter: D hidden, F feed-forward, H one head, Q all query heads together, K all key heads, V vocabulary,
E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from lite.gguf.architectures.architecture import Config
from lite.gguf.planned import Piece, Planned, planned

BLOCK = "model.layers.{layer}."  # in the checkpoint; `blk.{layer}.` in the file


@dataclass(frozen=True)
class Attention:
    """Which of attention's tensors a family has, and how they are changed."""

    biases: tuple[str, ...] = ()  # of q, k, v, o
    norms: bool = False  # of each query and key head
    permuted: bool = False  # rotary halves alternate
    shift: float = 0.0  # of its norms


def head_size(config: Config) -> int:
    """H: config.json's head_dim, or the hidden size split among the heads."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def attention(config: Config, layer: int, kind: Attention) -> Iterator[Planned]:
    """Projections, biases and norms of one layer's attention, its four matrices apart."""
    source, target = BLOCK.format(layer=layer) + "self_attn.", f"blk.{layer}."
    hidden, size = config["hidden_size"], head_size(config)  # D, H
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys = heads * size, kv_heads * size  # Q, K
    for letter, name, rows, columns, split in (
        ("q", "attn_q", queries, hidden, heads),
        ("k", "attn_k", keys, hidden, kv_heads),
        ("v", "attn_v", keys, hidden, 0),
        ("o", "attn_output", hidden, queries, 0),
    ):
        split = split if kind.permuted else 0
        yield planned(f"{target}{name}.weight", f"{source}{letter}_proj.weight", (rows, columns), heads=split)
        if letter in kind.biases:
            yield planned(f"{target}{name}.bias", f"{source}{letter}_proj.bias", (rows,), heads=split)
    if kind.norms:
        for letter in "qk":
            yield planned(
                f"{target}attn_{letter}_norm.weight", f"{source}{letter}_norm.weight", (size,), shift=kind.shift
            )


def norms(config: Config, layer: int, names: dict[str, str], shift: float = 0.0) -> Iterator[Planned]:
    """Norms over the hidden size: name in the checkpoint → name in the file."""
    for source, name in names.items():
        tensor = f"{BLOCK.format(layer=layer)}{source}.weight"
        yield planned(f"blk.{layer}.{name}.weight", tensor, (config["hidden_size"],), shift=shift)


def gated(
    config: Config, layer: int, *, width: int, biases: bool = False, part: str = "mlp", suffix: str = ""
) -> Iterator[Planned]:
    """A gated feed-forward: gate and up (F, D), down (D, F). `width` is F; `suffix` ends its names in the file."""
    hidden = config["hidden_size"]
    for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        source = f"{BLOCK.format(layer=layer)}{part}.{name}_proj"
        yield planned(f"blk.{layer}.ffn_{name}{suffix}.weight", f"{source}.weight", shape)
        if biases:
            yield planned(f"blk.{layer}.ffn_{name}{suffix}.bias", f"{source}.bias", shape[:1])


def experts(
    config: Config, layer: int, names: frozenset[str], *, count: int, width: int, part: str, spelling: dict[str, str]
) -> Iterator[Planned]:
    """A layer's experts, stacked: gate and up (E, F, D), down (E, D, F); and their router (E, D).

    They lie in the checkpoint one by one, by the family's `spelling` (gate → w1) under `part`, or, as transformers 5
    has them in memory, as `mlp.experts.gate_up_proj` (E, 2 F, D) and `mlp.experts.down_proj` (E, D, F).
    """
    hidden = config["hidden_size"]
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    block, target = BLOCK.format(layer=layer), f"blk.{layer}.ffn_"
    fused = f"{block}mlp.experts.gate_up_proj"
    together = fused in names
    router = f"{block}mlp.gate.weight" if together else f"{block}{part}.gate.weight"
    yield planned(f"{target}gate_inp.weight", router, (count, hidden))
    for name, shape in shapes.items():
        pieces: tuple[Piece, ...]
        if not together:
            source = f"{block}{part}.experts.{{}}.{spelling[name]}.weight"
            pieces = tuple(Piece.whole(source.format(expert), shape) for expert in range(count))
        elif name == "down":
            pieces = (Piece.whole(f"{block}mlp.experts.down_proj", (count, *shape)),)
        else:
            first = 0 if name == "gate" else width
            starts = (expert * 2 * width + first for expert in range(count))
            pieces = tuple(Piece(fused, (count, 2 * width, hidden), start, start + width) for start in starts)
        yield Planned(f"{target}{name}_exps.weight", (count, *shape), pieces)


def ends(config: Config, names: frozenset[str], *, shift: float = 0.0) -> Iterator[Planned]:
    """Embedding, last norm, and the head, where the checkpoint has one of its own.

    One that is stored though config.json ties it is kept, as transformers and llama.cpp's converter do: it may differ.
    """
    shape = (config["vocab_size"], config["hidden_size"])  # (V, D)
    yield planned("token_embd.weight", "model.embed_tokens.weight", shape)
    yield planned("output_norm.weight", "model.norm.weight", shape[1:], shift=shift)
    if "lm_head.weight" in names or not config["tie_word_embeddings"]:
        yield planned("output.weight", "lm_head.weight", shape)
