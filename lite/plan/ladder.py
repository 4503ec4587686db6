"""The ladder of levers, cheapest in time first; a lever that the recipe sets stays as it is set on every rung."""

from collections.abc import Iterator
from dataclasses import replace

from lite.engine.forward import CHUNK_TOKENS
from lite.memory.levers import Levers
from lite.plan.trials import Settings, Trials

SMALL_CHUNK_TOKENS = 128
TILE_TOKENS = 2048  # of the MLP: products of fewer rows would be slower


def rungs(trials: Trials) -> Iterator[tuple[str, Settings]]:
    """The ladder: each rung's name and its settings, layer counts left open; rungs that change nothing are left out."""
    recipe = trials.recipe
    on_card = trials.target.device_type == "cuda"
    fixed = Levers.of(recipe)
    start = Settings(
        recipe.tokens_per_pack or 0,
        recipe.chunk_tokens or CHUNK_TOKENS,
        bool(recipe.split_pairs),
        replace(fixed, recompute_layers=0),
    )
    streams = recipe.recompute_layers != 0 and not recipe.full  # trained weights stay on the card
    steps: list[tuple[str, str, object, bool]] = [
        ("the input embedding on the host", "embedding_on_host", True, on_card and movable(trials)),
        ("logits of fewer tokens at once", "chunk_tokens", SMALL_CHUNK_TOKENS, True),
        ("checkpoints on the host", "offload_checkpoints", True, on_card and _inputs_fit_the_host(trials)),
        ("the MLP in tiles", "mlp_tile_tokens", TILE_TOKENS, _longest_pack(trials) > TILE_TOKENS),
        ("pairs one completion at a time", "split_pairs", True, len(recipe.signature.completions) > 1),
        ("frozen layers on the host", "layers_on_host", 1, on_card and streams),
    ]
    yield "recomputed layers", start
    for words, key, value, possible in steps:
        if not possible or getattr(recipe, key) is not None:
            continue
        if key in ("chunk_tokens", "split_pairs"):
            start = replace(start, **{key: value})
        else:
            start = replace(start, levers=replace(start.levers, **{key: value}))
        yield words, start


def movable(trials: Trials) -> bool:
    """Whether the input embedding may lie on the host: it is not trained, and not the head as well."""
    tied = getattr(trials.config.get_text_config(), "tie_word_embeddings", False)
    return not tied and not trials.recipe.train_embeddings


def _inputs_fit_the_host(trials: Trials) -> bool:
    """Whether the inputs of all layers, of the smallest pack that holds the longest example, have room on the host."""
    whole = trials.recipe.split_pairs is False or len(trials.recipe.signature.completions) == 1
    tokens = max(trials.rows.unit_tokens(split=not whole), trials.recipe.tokens_per_pack or 0)
    width = trials.config.get_text_config().hidden_size * trials.target.dtype.itemsize
    inputs_bytes = trials.layers * tokens * width
    return trials.recipe.recompute_layers != 0 and inputs_bytes <= trials.target.host_budget_bytes


def _longest_pack(trials: Trials) -> int:
    return max(trials.rows.longest.tokens, trials.recipe.tokens_per_pack or 0)
