"""A run's memory: planned before anything is loaded, measured after its first step, and the two side by side."""

from dataclasses import dataclass

import psutil
import torch

from lite.data.prepare import Prepared
from lite.engine.forward import CHUNK_TOKENS
from lite.engine.layout import TOKENS_PER_PACK
from lite.errors import RunError
from lite.memory.levers import Levers
from lite.plan import words
from lite.plan.plan import Plan, Unplannable, settled
from lite.plan.trials import Settings
from lite.recipe import Recipe, planned_settings
from lite.sizes import in_gib
from lite.train import machine
from lite.train.progress import Progress

EVERY_LAYER = 10**4


def plan_run(
    recipe: Recipe, data: Prepared, steps: int, progress: Progress, *, go_on: bool = False
) -> tuple[Recipe, Plan | None]:
    """The recipe with every memory setting settled, and the plan that did it; no plan of a model that has none.

    Raises RunError if it does not fit, unless the recipe has `force`; `go_on`: only says so.
    """
    progress.stage("planning the memory")
    try:
        plan = settled(recipe, data.train, steps, advise=not (recipe.force or go_on))
    except Unplannable as error:
        progress.note(f"no plan: {error}")
        progress.note("going on with every layer recomputed; what does not fit will be told when it happens")
        return _unplanned(recipe), None
    progress.note(f"plan: {words.summary(plan)}")
    if told := words.loading(plan):
        progress.note(f"loading {told}")
    if not plan.fits:
        if not (recipe.force or go_on):
            raise RunError(words.refusal(plan))
        progress.note("it goes on all the same")
    return plan.recipe, plan


def _unplanned(recipe: Recipe) -> Recipe:
    """The recipe with what is safest where it leaves something open."""
    levers = Levers(recompute_layers=EVERY_LAYER)
    safest = Settings(TOKENS_PER_PACK, CHUNK_TOKENS, levers=levers).into(recipe)
    left_open = [key for key in planned_settings() if getattr(recipe, key) is None]
    return recipe.model_copy(update={key: getattr(safest, key) for key in left_open})


@dataclass
class Comparison:
    """The plan beside the first step's peak."""

    planned_bytes: int

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> "Comparison":
        """To be made when all is loaded and no step was taken: on a CPU the process has other memory as well."""
        if device.type == "cuda":
            return cls(plan.peak_bytes)
        return cls(psutil.Process().memory_info().rss + plan.peak_bytes - plan.loaded_bytes)

    def told(self, device: torch.device) -> str:
        """Both, as a line."""
        measured = machine.peak_bytes(device)
        apart = f"{measured / self.planned_bytes - 1:+.1%}"
        if device.type != "cuda":
            apart += ", of the whole process, which keeps pages that it has freed"
        return f"memory: planned {in_gib(self.planned_bytes)}, measured {in_gib(measured)} ({apart})"
