"""The longest pair that fits, lever by lever: what each is worth, every layer recomputed.

A pair of so many tokens in one pack, its prompt short, so that nearly all of it is scored and runs through the layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lite.plan import lengths, skeleton
from lite.plan.ladder import rungs
from lite.plan.law import Law, between
from lite.plan.lengths import Lengths, Row
from lite.plan.target import Target
from lite.plan.trials import Settings, Trials
from lite.recipe import Recipe

NEAR, FAR = 16_384, 65_536  # tokens of the packs that are run: in between and beyond, a line
LEFT_OUT = ("split_pairs", "layers_on_host")  # levers that change what is asked for


@dataclass(frozen=True)
class Reach:
    """How long a pack may be under the levers so far."""

    words: str
    settings: Settings
    tokens: int
    peak_bytes: int
    host_bytes: int
    tokens_per_second: float
    fixed_bytes: int  # whatever the pack
    bytes_per_token: float


def reaches(recipe: Recipe, where: Target) -> Iterator[Reach]:
    """Each rung of the ladder without streaming and splitting, with the longest pack that fits on it."""
    open_recipe = recipe.model_copy(update={"split_pairs": False, "layers_on_host": 0, "tokens_per_pack": None})
    config = skeleton.config_of(recipe)
    rows = _of_one(recipe, NEAR)
    trials = Trials(open_recipe, config, rows, where)
    for words, settings in rungs(trials):
        near = trials.law(settings, NEAR, kept=False)
        far = trials.law(settings, FAR, kept=False)
        tokens = _longest(near, far, trials.layers, where)
        here = between(near, far, tokens)
        slope = (far.peak_bytes(trials.layers, 0) - near.peak_bytes(trials.layers, 0)) / (FAR - NEAR)
        yield Reach(
            words,
            replace(settings, levers=replace(settings.levers, recompute_layers=trials.layers)),
            tokens,
            round(here.peak_bytes(trials.layers, 0)),
            round(here.host_bytes(trials.layers, 0)),
            tokens / here.seconds(trials.layers, 0) if tokens else 0.0,
            round(near.peak_bytes(trials.layers, 0) - NEAR * slope),
            slope,
        )


def _of_one(recipe: Recipe, tokens: int) -> Lengths:
    count = len(recipe.signature.completions)
    each = (tokens - lengths.SHORT_PROMPT) // count
    row = Row(tokens - each * count, (each,) * count)
    return Lengths(row, None, tokens, tokens, row, assumed=True)


def _longest(near: Law, far: Law, layers: int, where: Target) -> int:
    """Tokens of the longest pack on the line through two that fits, the host's memory as well; 0 if none does."""
    low, high = 0, 2**22
    while high - low > 1:
        middle = (low + high) // 2
        here = between(near, far, middle)
        on_host = here.host_bytes(layers, 0) <= where.host_budget_bytes
        if on_host and here.peak_bytes(layers, 0) <= where.budget_bytes:
            low = middle
        else:
            high = middle
    return low
