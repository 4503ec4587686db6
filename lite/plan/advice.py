"""Advice: the smallest changes with which a recipe that does not fit would, each tried before it is named."""

import math
from collections.abc import Iterator
from dataclasses import replace

from lite.plan import cards, skeleton
from lite.plan.lengths import Lengths
from lite.plan.search import least_bytes, search
from lite.plan.target import Target
from lite.plan.trials import Trials
from lite.recipe import Recipe, planned_settings
from lite.sizes import GIB

SHORTEST = 256  # tokens: a max_length below it is no advice


def advice(recipe: Recipe, rows: Lengths, where: Target) -> Iterator[str]:
    """What it would fit with, the smallest change first, as `it would fit with …` goes on; how much memory, last."""
    config = skeleton.config_of(recipe)

    def fits(changed: Recipe, lengths: Lengths = rows) -> bool:
        # Left open, it is chosen for its time once all fits.
        settled = changed.model_copy(update={"keep_weights": bool(changed.keep_weights)})
        return search(Trials(settled, config, lengths, where), longest=False).fits

    open_again = recipe.model_copy(update=dict.fromkeys(planned_settings()))
    if open_again.resolved() != recipe.resolved() and fits(open_again):
        yield "its memory settings left to the planner: there are some that fit"
        return
    found = False
    for change, words in _changes(recipe):
        if fits(recipe.model_copy(update=change)):
            yield words
            found = True
            break
    lengths = list(_shorter(recipe, rows))
    low, high = 0, len(lengths)  # of lengths[low:] all fit that are asked about
    while low < high:
        middle = (low + high) // 2
        if fits(recipe, lengths[middle][1]):
            high = middle
        else:
            low = middle + 1
    if low < len(lengths):
        yield f"--max-length {lengths[low][0]}"
        found = True
    yield memory(least_bytes(Trials(recipe, config, rows, where)), where) + ("" if found else "; nothing smaller helps")


def memory(needed_bytes: int, where: Target) -> str:
    """The least memory, in whole GB, of which a step may take so much."""
    if where.device_type == "cpu":
        return f"{math.ceil(needed_bytes / cards.HOST_FREE / GIB)} GB of free memory"
    return f"a card with {math.ceil((needed_bytes + cards.CONTEXT_BYTES) / (1 - cards.FRAGMENTATION) / GIB)} GB"


def _changes(recipe: Recipe) -> Iterator[tuple[dict[str, object], str]]:
    """Single changes of the recipe, the least of them first."""
    if recipe.full:
        yield from _changes_of_full(recipe)
        return
    if recipe.optimizer == "adamw":
        yield {"optimizer": "adamw-8bit"}, "--optimizer adamw-8bit"
    if recipe.lora_r > 8:
        yield {"lora_r": 8}, "--lora-r 8"
    if not recipe.load_in_4bit:
        yield {"load_in_4bit": True, "load_in_8bit": False}, "--4bit"
        yield {"load_in_4bit": True, "load_in_8bit": False, "optimizer": "adamw-8bit"}, "--4bit --optimizer adamw-8bit"


def _changes_of_full(recipe: Recipe) -> Iterator[tuple[dict[str, object], str]]:
    if recipe.optimizer != "galore":
        if recipe.optimizer == "adamw":
            yield {"optimizer": "adamw-8bit"}, "--optimizer adamw-8bit"
        yield {"optimizer": "galore"}, "--optimizer galore"
        yield {"optimizer": "galore", "dtype": "auto"}, "--optimizer galore --dtype auto"
        return
    if recipe.galore_states != "8bit":
        yield {"galore_states": "8bit"}, "--galore-states 8bit"
    for rank in (64, 32):
        if recipe.galore_rank > rank:
            yield {"galore_rank": rank}, f"--galore-rank {rank}"
    if not recipe.int8_weights:
        yield {"int8_weights": True}, "--int8-weights"
    if recipe.train_embeddings:
        yield {"train_embeddings": False}, "--no-train-embeddings"
        yield {"train_embeddings": False, "int8_weights": True}, "--no-train-embeddings --int8-weights"


def _shorter(recipe: Recipe, rows: Lengths) -> Iterator[tuple[int, Lengths]]:
    """Smaller values of max_length, the longest first, and the rows as they would be; multiples of 256."""
    longest = rows.longest
    for count in range(longest.longest // SHORTEST, 0, -1):
        length = count * SHORTEST
        if length >= longest.longest or (count & (count - 1) and count > 8):
            continue
        short = longest.stretched(max(8, round(longest.tokens * length / longest.longest)))
        yield length, replace(rows, longest=short, most_tokens=min(rows.most_tokens, short.tokens * recipe.batch_size))
