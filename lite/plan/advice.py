"""Advice: the smallest changes with which a recipe that does not fit would, each tried before it is named."""

from collections.abc import Iterator
from dataclasses import replace

from lite.plan import skeleton
from lite.plan.lengths import Lengths
from lite.plan.search import search
from lite.plan.target import Target
from lite.plan.trials import SETTLED, Trials
from lite.recipe import Recipe
from lite.sizes import GIB

SHORTEST = 256  # tokens: a max_length below it is no advice


def advice(recipe: Recipe, rows: Lengths, where: Target) -> Iterator[str]:
    """Lines that say what would fit, the smallest change first; what card it would take, last."""
    config = skeleton.config_of(recipe)
    open_again = recipe.model_copy(update=dict.fromkeys(SETTLED))
    if (
        open_again.resolved() != recipe.resolved()
        and search(Trials(open_again, config, rows, where), longest=False).fits
    ):
        yield "leave the memory settings to the planner: there are some that fit"
        return
    found = False
    for change, words in _changes(recipe):
        if search(Trials(recipe.model_copy(update=change), config, rows, where), longest=False).fits:
            yield words
            found = True
            break
    if (shorter := _shorter(recipe, rows, where)) is not None:
        yield f"--max-length {shorter}"
        found = True
    needs = search(Trials(recipe, config, rows, where), longest=False).tried
    least = min(one.least_bytes for one in needs)
    whole = "" if found else "; nothing smaller helps"
    yield f"or a card with {(least + where.reserve_bytes) / GIB:.0f} GB{whole}"


def _changes(recipe: Recipe) -> Iterator[tuple[dict[str, object], str]]:
    """Single changes of the recipe, the least of them first."""
    if recipe.optimizer == "adamw":
        yield {"optimizer": "adamw-8bit"}, "--optimizer adamw-8bit"
    if recipe.lora_r > 8:
        yield {"lora_r": 8}, "--lora-r 8"
    if not recipe.load_in_4bit:
        yield {"load_in_4bit": True, "load_in_8bit": False}, "--4bit"
        yield {"load_in_4bit": True, "load_in_8bit": False, "optimizer": "adamw-8bit"}, "--4bit --optimizer adamw-8bit"


def _shorter(recipe: Recipe, rows: Lengths, where: Target) -> int | None:
    """The longest max_length, a multiple of 256, that fits; None if there is none."""
    config, longest = skeleton.config_of(recipe), rows.longest
    for count in range(longest.longest // SHORTEST, 0, -1):
        length = count * SHORTEST
        if length >= longest.longest or (count & (count - 1) and count > 8):
            continue
        short = longest.stretched(max(8, round(longest.tokens * length / longest.longest)))
        fewer = replace(rows, longest=short, most_tokens=min(rows.most_tokens, short.tokens * recipe.batch_size))
        if search(Trials(recipe, config, fewer, where), longest=False).fits:
            return length
    return None
