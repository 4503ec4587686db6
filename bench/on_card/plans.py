"""What bench/card.py plans: the settings of each of lite's rows, made in processes of their own while the card works.

A plan runs a whole step of the model on meta tensors, seconds of one core each; on a machine of many cores they are all
there before they are needed, and cost the card no time.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from typing import Any

from lite.plan import skeleton
from lite.plan.ladder import SMALL_CHUNK_TOKENS, TILE_TOKENS
from lite.plan.lengths import SHORT_PROMPT, Lengths, Row
from lite.plan.longest import reaches
from lite.plan.plan import plan
from lite.plan.target import Target, target
from lite.plan.trials import Trials
from lite.recipe import Recipe, planned_settings

ATTEMPTS = 4  # at a pack that fits as a whole, each time a little shorter
# The levers that leave every pair whole and every layer on the card, at what the planner's last rung has.
LONGEST = {"recompute_layers": 10_000, "embedding_on_host": True, "offload_checkpoints": True,
           "chunk_tokens": SMALL_CHUNK_TOKENS, "mlp_tile_tokens": TILE_TOKENS}  # fmt: skip
WORKERS = 4  # at most; two cores are left to the steps


@dataclass(frozen=True)
class Planned:
    """A plan as far as a row needs it."""

    settings: dict[str, Any]  # the recipe's, those included that the planner chose
    row: tuple[int, ...]  # tokens of the prompt and of each completion
    fits: bool
    tokens: int  # of the largest pack
    peak_bytes: int
    host_bytes: int
    step_seconds: float
    operators_per_layer: dict[str, int]  # that a kept or a recomputed layer starts in a step

    @property
    def recipe(self) -> Recipe:
        """To train by."""
        return Recipe(**self.settings)


class Plans:
    """Plans on their way, by name; where cores are few they are made when they are asked for."""

    def __init__(self, where: Target, workers: int | None = None) -> None:
        """workers: processes that plan; without them as many as there are cores to spare."""
        self.where = where
        workers = min(WORKERS, (os.cpu_count() or 1) - 2) if workers is None else workers
        context = get_context("spawn")  # a fork would take CUDA's state along
        self._pool = ProcessPoolExecutor(workers, context, _alone) if workers > 0 else None
        self._made: dict[str, Future[Planned] | Callable[[], Planned]] = {}

    def order(self, name: str, settings: dict[str, Any], row: tuple[int, ...] | None) -> None:
        """Have a plan made of one example of these lengths; without them of the longest that fits."""
        where = self.where
        if row is None and where.device_type != "cuda":  # whose attention takes long to run over long packs
            where = target(Recipe(**settings | {"vram": "0.7GB"}), card="rtx-4090")
        act, given = (longest, (settings, where)) if row is None else (planned, (settings, row, where))
        self._made[name] = self._pool.submit(act, *given) if self._pool else lambda: act(*given)

    def of(self, name: str) -> Planned:
        """The plan, waited for."""
        made = self._made[name]
        return made.result() if isinstance(made, Future) else made()

    def end(self) -> None:
        """Make no more, and wait for none."""
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.kill()


def planned(settings: dict[str, Any], row: tuple[int, ...], where: Target) -> Planned:
    """The plan of steps of `batch_size` examples that are all alike."""
    recipe = Recipe(**settings)
    one = Row(row[0], row[1:])
    count = recipe.batch_size * one.tokens
    rows = Lengths(one, None, count, count, one)
    made = plan(recipe, rows=rows, where=where, longest=False, advise=False)
    return Planned(
        settings | {key: getattr(made.recipe, key) for key in planned_settings()}, row, made.fits, made.tokens,
        made.peak_bytes, made.host_bytes, made.step_seconds,
        {} if recipe.full else _operators(Trials(recipe, skeleton.config_of(recipe), rows, where), made.settings, made),
    )  # fmt: skip


def longest(settings: dict[str, Any], where: Target) -> Planned:
    """The plan of the longest pair in one pack that fits with all levers pulled; its prompt is short."""
    settings = settings | LONGEST
    tokens = max(reach.tokens for reach in reaches(Recipe(**settings), where))
    for _ in range(ATTEMPTS):
        made = planned(settings, long_pair(tokens), where)
        if made.fits:
            break
        tokens = int(0.985 * tokens)
    return made


def long_pair(tokens: int) -> tuple[int, int, int]:
    """A pair of so many tokens (one less, if they are odd), nearly all of them scored."""
    each = (tokens - SHORT_PROMPT) // 2
    return SHORT_PROMPT, each, each


def _operators(trials: Trials, settings: Any, made: Any) -> dict[str, int]:
    recomputed = min(settings.levers.recompute_layers, trials.layers)
    kept = trials.layers - recomputed
    law = trials.law(settings, made.tokens, kept=kept > 0, recomputed=recomputed > 0)
    started = [times[1] for times in law.of(kept).times.values()]  # seconds; each operator takes the card's `launch_s`
    launch_s = trials.target.card.launch_s
    counts = {"kept": (kept, "kept"), "recomputed": (recomputed, "recomputed")}
    return {
        name: round(sum(getattr(one, slope) for one in started) / launch_s)
        for name, (layers, slope) in counts.items()
        if layers
    }


def _alone() -> None:
    import torch

    torch.set_num_threads(1)
