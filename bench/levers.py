"""What each memory lever is worth on a 24 GB card, by plan, beside the arithmetic of the same models.

    python bench/levers.py --out bench/results/levers-plan.json

Needs no card and no weights: the real step runs on meta tensors. Of each rung of the planner's ladder, every layer
recomputed: bytes that do not depend on the pack, bytes a token, the longest pack that fits. The arithmetic counts what
must be there: NF4 weights, embeddings in bf16, fp32 adapters with gradients and states, a layer's input for each token
and layer, and one layer's activations. The plan counts what the code allocates at its worst moment.
Then each lever by itself, of the first model: a step of one pair in one pack with every layer recomputed, and the same
with one lever changed; of the whole model's dry run, bytes on the card and on the host, and predicted seconds.
All of it takes minutes.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from measuring import Found, command, machine, save

from lite.engine.forward import CHUNK_TOKENS
from lite.memory.levers import Levers
from lite.model import catalog
from lite.plan import skeleton
from lite.plan.ladder import SMALL_CHUNK_TOKENS, TILE_TOKENS
from lite.plan.lengths import Lengths, Row
from lite.plan.longest import FAR, NEAR, reaches
from lite.plan.target import target
from lite.plan.trials import Settings, Trials
from lite.recipe import Recipe
from lite.sizes import GIB

MODELS = ("qwen2.5-14b", "qwen3-14b")
RANK = 16
KIB = 1024
# Completions of a pair, after a prompt of as many tokens: packs of 1,536 and of 8,190 tokens.
PAIRS = (512, 2730)


def arithmetic(shape: catalog.Shape) -> dict[str, tuple[float, float]]:
    """Fixed GiB and KiB a token of each rung: what must be there at the least."""
    nf4 = shape.layers * shape.matrix_parameters * (0.5 + 1 / 64 + 4 / (64 * 256))
    table = shape.vocab_size * shape.hidden_size * 2
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    adapters = RANK * shape.layers * (2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + mlp))
    fixed = nf4 + 2 * table + adapters * 16  # fp32: weight, gradient, two moments
    checkpoint = 2 * hidden * shape.layers / KIB
    # One layer: its input, two norms' results, q, k, v, attention's result, the sum before the MLP, gate and up.
    layer = 2 * (5 * hidden + 2 * queries + 2 * keys + 2 * mlp) / KIB
    tiled = 2 * (5 * hidden + 2 * queries + 2 * keys) / KIB
    away = (fixed - table) / GIB
    return {
        "recomputed layers": (fixed / GIB, checkpoint + layer),
        "the input embedding on the host": (away, checkpoint + layer),
        "logits of fewer tokens at once": (away, checkpoint + layer),
        "checkpoints on the host": (away, 2 * 2 * hidden / KIB + layer),
        "the MLP in tiles": (away, 2 * 2 * hidden / KIB + tiled),
    }


def rows_of(name: str) -> list[Found]:
    """The ladder of one model on a card of 24 GB."""
    recipe = Recipe(method="orpo", model=name, load_in_4bit=True, vram="24GB", lora_r=RANK)
    where, expected = target(recipe), arithmetic(catalog.CATALOG[name])
    rows = []
    for reach in reaches(recipe, where):
        fixed, slope = expected[reach.words]
        budget = where.budget_bytes / GIB
        rows.append(
            {
                "model": name, "lever": reach.words, "longest_tokens": reach.tokens,
                "fixed_gib": reach.fixed_bytes / GIB, "kib_per_token": reach.bytes_per_token / KIB,
                "arithmetic_fixed_gib": fixed, "arithmetic_kib_per_token": slope,
                "arithmetic_longest_tokens": round((budget - fixed) * GIB / (slope * KIB)),
                "host_gib": reach.host_bytes / GIB, "tokens_per_second": reach.tokens_per_second,
            }
        )  # fmt: skip
    return rows


def alone(name: str, each: int) -> list[Found]:
    """What each lever by itself changes in a step of one pair, every layer recomputed."""
    row = Row(each, (each, each))
    recipe = Recipe(method="orpo", model=name, load_in_4bit=True, vram="24GB", lora_r=RANK, batch_size=1)
    config = skeleton.config_of(recipe)
    trials = Trials(recipe, config, Lengths(row, None, row.tokens, row.tokens, row, assumed=True), target(recipe))
    layers = trials.layers
    start = Settings(row.tokens, CHUNK_TOKENS, False, Levers(layers))
    changed = {
        "every layer recomputed": start,
        "no layer recomputed": replace(start, levers=Levers(0)),
        "their attention kept": replace(start, levers=Levers(layers, keep_attention=True)),
        "their weights kept": replace(start, levers=Levers(layers, keep_weights=True)),
        "the input embedding on the host": replace(start, levers=Levers(layers, embedding_on_host=True)),
        f"logits of {SMALL_CHUNK_TOKENS} tokens at once": replace(start, chunk_tokens=SMALL_CHUNK_TOKENS),
        "checkpoints on the host": replace(start, levers=Levers(layers, offload_checkpoints=True)),
        f"the MLP in tiles of {TILE_TOKENS:,}": replace(start, levers=Levers(layers, mlp_tile_tokens=TILE_TOKENS)),
        "the pair one completion at a time": replace(start, tokens_per_pack=row.longest, split_pairs=True),
        "every layer on the host": replace(start, levers=Levers(layers, layers_on_host=layers)),
    }
    rows = []
    for words, settings in changed.items():
        outcome = trials.outcome(settings, settings.tokens_per_pack)
        rows.append(
            {
                "model": name, "tokens": row.tokens, "lever": words, "device_bytes": outcome.peak_bytes,
                "host_bytes": outcome.host_bytes, "step_seconds": outcome.cost.step_seconds(), "peak_in": outcome.phase,
                "parts": dict(outcome.parts),
            }
        )  # fmt: skip
    return rows


def print_alone(rows: list[Found]) -> None:
    """A line for each lever, beside the first one's."""
    first = rows[0]
    print(f"\n{first['model']}, NF4, r = {RANK}, one pair of {first['tokens']:,} tokens, one lever at a time")
    print(f"{'lever':<34}" + "".join(f"{word:>12}" for word in ("card GiB", "change", "host GiB", "seconds", "change")))
    for row in rows:
        size, seconds = row["device_bytes"] / GIB, row["step_seconds"]
        figures = (f"{size:.2f}", f"{size - first['device_bytes'] / GIB:+.2f}", f"{row['host_bytes'] / GIB:.2f}",
                   f"{seconds:.3f}", f"{seconds / first['step_seconds'] - 1:+.1%}")  # fmt: skip
        print(f"{row['lever']:<34}" + "".join(f"{figure:>12}" for figure in figures))


def main() -> None:
    """Plan both models and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [row for name in MODELS for row in rows_of(name)]
    head = (
        "lever",
        "longest",
        "arithmetic",
        "fixed GiB",
        "arithmetic",
        "KiB/token",
        "arithmetic",
        "host GiB",
        "tokens/s",
    )
    keys = ("longest_tokens", "arithmetic_longest_tokens", "fixed_gib", "arithmetic_fixed_gib", "kib_per_token",
            "arithmetic_kib_per_token", "host_gib", "tokens_per_second")  # fmt: skip
    for name in MODELS:
        print(f"\n{name}, NF4, r = {RANK}, every layer recomputed, 22.5 GiB; run: {NEAR:,} and {FAR:,} tokens")
        print(f"{head[0]:<34}" + "".join(f"{word:>12}" for word in head[1:]))
        for row in [row for row in rows if row["model"] == name]:
            figures = [f"{row[key]:,.0f}" if row[key] > 1000 else f"{row[key]:.2f}" for key in keys]
            print(f"{row['lever']:<34}" + "".join(f"{figure:>12}" for figure in figures))
    one_by_one = [row for each in PAIRS for row in alone(MODELS[0], each)]
    for each in PAIRS:
        print_alone([row for row in one_by_one if row["tokens"] == 3 * each])
    save({"command": command(), "machine": machine(), "rows": rows, "one_lever": one_by_one}, options.out)


if __name__ == "__main__":
    main()
