"""The plan of a recipe: whether it fits, at which settings, what takes the memory, how long it will take.

Made without weights and without a GPU: from the model's config, or the catalogue's shape of it, and the lengths of the
data. The same plan settles what a recipe leaves open before it trains.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lite.data.examples import TokenExample
from lite.errors import ModelError
from lite.plan import lengths, skeleton
from lite.plan.advice import advice
from lite.plan.lengths import Lengths
from lite.plan.search import Chosen, Tried, search
from lite.plan.target import Target, at_hand, target
from lite.plan.trials import Settings, Trials
from lite.recipe import Recipe, planned_settings

PLENTY = 0.5  # of the budget: where a few layers tell of no more, the whole model is not run
# Of the peak; there are others where a step has them.
PARTS = (
    "weights",
    "adapters",
    "projections",
    "gradients",
    "optimizer",
    "activations",
    "working",
    "logits",
    "dequantised",
)
QUANTISED_A_SECOND = 25e6  # weights, by bitsandbytes on two cores; a checkpoint that is quantised already needs none
NF4_BITS = 4.127  # a weight, its scales quantised again
CONFIRMATIONS = 3  # whole runs at most, each with a layer more recomputed, before the least hungry settings are taken


class Unplannable(ModelError):
    """A model whose step cannot be run without its numbers."""


Said = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a run of the recipe will take."""

    recipe: Recipe  # with everything settled
    fits: bool
    target: Target
    lengths: Lengths
    settings: Settings
    tokens: int  # of the largest pack
    layers: int
    peak_bytes: int  # of live tensors on the device
    loaded_bytes: int  # of these, what is there before the first step: weights and adapters
    parts: dict[str, int]  # what the peak is made of, and `reserve`
    weights: dict[str, int]  # of the frozen ones: layers, embedding, head, rest
    host_bytes: int
    step_seconds: float
    longest_pair_tokens: int
    tried: tuple[Tried, ...]
    confirmed: bool  # whether the whole model was run, rather than a few layers of it
    seconds: float  # that the plan took
    advice: tuple[str, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Of training."""
        return self.lengths.batch_tokens / self.step_seconds

    @property
    def levers_on_host(self) -> bool:
        """Whether anything was put into host memory to make room."""
        levers = self.settings.levers
        return levers.offload_checkpoints or levers.embedding_on_host or levers.layers_on_host > 0

    @property
    def quantising_seconds(self) -> float:
        """Of loading, where the weights are quantised on the CPU since some of them stay there; else 0."""
        on_cpu = self.settings.levers.layers_on_host and (self.recipe.load_in_4bit or self.recipe.load_in_8bit)
        weights = self.weights["layers"] * (8 / NF4_BITS if self.recipe.load_in_4bit else 1)
        return weights / QUANTISED_A_SECOND if on_cpu else 0.0

    @property
    def training_seconds(self) -> float | None:
        """Of all steps, if their number is known."""
        return None if self.lengths.steps is None else self.lengths.steps * self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        """For programs; sizes in bytes."""
        place = self.lengths.longest.place
        return {
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "budget_bytes": self.target.budget_bytes,
            "memory_bytes": self.target.memory_bytes,
            "parts": self.parts,
            "weights": self.weights,
            "host_bytes": self.host_bytes,
            "longest_pair_tokens": self.longest_pair_tokens,
            "tokens_per_pack": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "step_seconds": self.step_seconds,
            "steps": self.lengths.steps,
            "training_seconds": self.training_seconds,
            "settings": {name: getattr(self.settings.into(self.recipe), name) for name in planned_settings()},
            "tried": [vars(one) for one in self.tried],
            "longest_row": None if place is None else str(place),
            "confirmed": self.confirmed,
            "card": self.target.card.name,
            "assumptions": list(self.target.assumptions),
            "advice": list(self.advice),
            "seconds": round(self.seconds, 3),
        }


def plan(
    recipe: Recipe,
    *,
    rows: Lengths | None = None,
    where: Target | None = None,
    quick: bool = False,
    longest: bool = True,
    advise: bool = True,
    said: Said = lambda _: None,
) -> Plan:
    """The plan of a recipe for `where`, or for the machine that it names; `rows`: the data's lengths, if known.

    quick: by a few layers alone; else the whole model's step is run once. longest: whether to find the longest example
    that would fit; advise: whether to look for what would fit where the recipe does not. Raises Unplannable, and
    ModelError for levers that the model has not.
    """
    started = time.perf_counter()
    where = where or target(recipe)
    if recipe.attn_implementation == "padded":
        where = replace(where, assumptions=(*where.assumptions, "packs: padded batches take more than is planned"))
    rows = rows or lengths.assumed(recipe)
    config = skeleton.config_of(recipe)
    trials = Trials(recipe, config, rows, where)
    said("running steps of a few layers")
    try:
        chosen = search(trials, longest=longest)
        quick = quick or chosen.peak_bytes < PLENTY * where.budget_bytes
        if not quick:
            said("running a step of the whole model")
        found = _confirmed(trials, chosen, quick=quick)
    except (RuntimeError, NotImplementedError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Unplannable(
            f"{recipe.model}: its step cannot be run without its numbers, so no plan can be made of it: {first}"
        ) from error
    chosen, peak, parts, host, seconds = found
    fits = chosen.fits and peak <= where.budget_bytes
    sizes = {name: round(size) for name, size in parts.items() if size}
    parts = {**dict.fromkeys(PARTS, 0), **sizes, "reserve": where.reserve_bytes}
    made = Plan(
        recipe=chosen.settings.into(recipe),
        fits=fits,
        target=where,
        lengths=rows,
        settings=chosen.settings,
        tokens=chosen.tokens,
        layers=trials.layers,
        peak_bytes=round(peak),
        loaded_bytes=parts["weights"] + parts["adapters"],
        parts=parts,
        weights=trials.static(),
        host_bytes=round(host),
        step_seconds=seconds,
        longest_pair_tokens=chosen.longest_pair_tokens,
        tried=chosen.tried,
        confirmed=not quick,
        seconds=time.perf_counter() - started,
    )
    if fits or not advise:
        return made
    return replace(made, advice=tuple(advice(recipe, rows, where)), seconds=time.perf_counter() - started)


def _confirmed(
    trials: Trials, chosen: Chosen, *, quick: bool
) -> tuple[Chosen, float, Counter[str] | dict[str, float], float, float]:
    """The choice, its peak, the peak's parts, host bytes and seconds of a step; by the whole model unless `quick`."""
    if quick:
        counts = chosen.recomputed, chosen.kept
        parts, host = chosen.law.parts_bytes(*counts), chosen.law.host_bytes(*counts)
        return chosen, chosen.peak_bytes, parts, host, chosen.step_seconds
    if chosen.plain and trials.outcome(chosen.settings, chosen.tokens).peak_bytes > trials.target.budget_bytes:
        return _confirmed(trials, chosen.plain, quick=False)
    for _ in range(CONFIRMATIONS):
        outcome = trials.outcome(chosen.settings, chosen.tokens)
        over = outcome.peak_bytes > trials.target.budget_bytes
        if not (over and chosen.fits and chosen.kept and trials.recipe.recompute_layers is None):
            break
        chosen = _recomputing(trials, chosen, 1)
    else:
        chosen = _recomputing(trials, chosen, chosen.kept)
        outcome = trials.outcome(chosen.settings, chosen.tokens)
    seconds = chosen.step_seconds
    return chosen, outcome.peak_bytes, outcome.parts, outcome.host_bytes, seconds


def _recomputing(trials: Trials, chosen: Chosen, more: int) -> Chosen:
    """The same with so many layers more recomputed."""
    law = chosen.law if chosen.law.alone else trials.law(chosen.settings, chosen.tokens)
    recomputed, kept = chosen.recomputed + more, chosen.kept - more
    seconds = chosen.step_seconds * law.seconds(recomputed, kept) / law.seconds(chosen.recomputed, chosen.kept)
    settings = replace(chosen.settings, levers=replace(chosen.settings.levers, recompute_layers=recomputed))
    return replace(chosen, settings=settings, law=law, recomputed=recomputed, kept=kept, step_seconds=seconds)


def settled(
    recipe: Recipe, examples: Sequence[TokenExample], steps: int, *, advise: bool = True, said: Said = lambda _: None
) -> Plan:
    """The plan of a run on this machine, on the rows that it trains on; `advise` as in `plan`."""
    rows = lengths.of_examples(examples, recipe, steps)
    return plan(recipe, rows=rows, where=at_hand(recipe), longest=False, advise=advise, said=said)
