"""What fits: the law of a pack under given settings, and how many layers must then be recomputed or on the host."""

import math
from dataclasses import replace

from lite.misfits import OF_RECOMPUTED
from lite.plan.ladder import movable
from lite.plan.law import Law, between
from lite.plan.trials import Settings, Trials

# Levers that some layer must be recomputed for; of layers on the host there is a number of its own.
OF_SOME_RECOMPUTED = tuple(lever for lever in OF_RECOMPUTED if lever != "layers_on_host")
FAR = 4  # times as many tokens: the other end of the line on which packs of other lengths lie


def weights_bytes(trials: Trials, settings: Settings) -> int:
    """The weights that stay on the device, an adapter's left out."""
    away = {"embedding": settings.levers.embedding_on_host, "layers": settings.levers.layers_on_host > 0}
    return sum(size for name, size in trials.static().items() if not away.get(name))


def law_of(trials: Trials, settings: Settings, tokens: int, *, like: Law | None = None, kept: bool = True) -> Law:
    """The law of a rung; where only the embedding's place differs from the next one's, by arithmetic from that.

    like: a law whose kinds of layers it is to tell of. kept: whether it may tell of kept layers.
    """
    if like is not None and like.alone is None:
        return trials.law(settings, tokens, recomputed=False)
    streamed = settings.levers.layers_on_host > 0
    fixed = trials.recipe.recompute_layers
    kept = (kept and not streamed) if fixed is None else fixed < trials.layers
    moves = trials.target.device_type == "cuda" and trials.recipe.embedding_on_host is None and movable(trials)
    if moves and not settings.levers.embedding_on_host:
        away = replace(settings, levers=replace(settings.levers, embedding_on_host=True))
        here = trials.law(away, tokens, kept=kept).heavier(trials.static()["embedding"])
    else:
        here = trials.law(settings, tokens, kept=kept)
    if streamed and (most := trials.recipe.layers_on_host) is not None:
        return here.heavier(max(0, most_recomputed(trials)[0] - most) * layer_bytes(trials))
    return here


def least_tokens(trials: Trials, settings: Settings) -> int:
    """Tokens of the smallest pack that holds the longest example, or as many as the recipe gives a pack."""
    unit = trials.rows.unit_tokens(split=settings.split_pairs)
    return max(unit, settings.tokens_per_pack) if settings.tokens_per_pack else unit


def most_recomputed(trials: Trials) -> tuple[int, int]:
    """Recomputed and kept layers where as many are recomputed as the recipe allows."""
    fixed = trials.recipe.recompute_layers
    count = trials.layers if fixed is None else min(fixed, trials.layers)
    return count, trials.layers - count


def least_recomputed(trials: Trials, settings: Settings, law: Law) -> int | None:
    """The fewest recomputed layers with which a pack fits, here and on the host; None if it does not with all."""
    if law.alone is None:
        return 0 if law.peak_bytes(0, trials.layers) <= trials.target.budget_bytes else None
    most, _ = most_recomputed(trials)
    fixed = trials.recipe.recompute_layers is not None or law.kept is None
    # What the recipe asks of recomputed layers needs one to be asked of.
    start = int(any(getattr(trials.recipe, lever) for lever in OF_SOME_RECOMPUTED))
    for count in (most,) if fixed else range(start, most + 1):
        on_device = law.peak_bytes(count, trials.layers - count) <= trials.target.budget_bytes
        if on_device and host_bytes(trials, settings, law, count) <= trials.target.host_budget_bytes:
            return count
    return None


def host_bytes(trials: Trials, settings: Settings, law: Law, count: int) -> float:
    """What lies in host memory; the law of streamed layers has all of them there."""
    found = law.host_bytes(count, trials.layers - count)
    if settings.levers.layers_on_host and trials.recipe.layers_on_host is None:
        found -= (count - fewest_on_host(trials, law, count)) * layer_bytes(trials)
    return found


def fewest_on_host(trials: Trials, law: Law, count: int) -> int:
    """Layers that must lie on the host: each one that need not adds its weights to the device."""
    if trials.recipe.layers_on_host is not None:
        return min(trials.recipe.layers_on_host, count)
    room = trials.target.budget_bytes - law.peak_bytes(count, trials.layers - count)
    return max(0, min(count, count - math.floor(room / layer_bytes(trials))))


def layer_bytes(trials: Trials) -> float:
    """Frozen weights of one layer."""
    return trials.static()["layers"] / trials.layers


def longest_tokens(trials: Trials, start: Settings, tokens: int, law: Law) -> int:
    """Tokens of the longest example that fits under these levers, every layer recomputed where that is left open."""
    r, p = most_recomputed(trials) if law.alone else (0, trials.layers)
    far = law_of(trials, start, FAR * tokens, like=law)
    low, high = tokens, 2**22
    while high - low > 1:
        middle = (low + high) // 2
        here = between(law, far, middle)
        on_host = host_bytes(trials, start, here, r) <= trials.target.host_budget_bytes
        if on_host and here.peak_bytes(r, p) <= trials.target.budget_bytes:
            low = middle
        else:
            high = middle
    return low
