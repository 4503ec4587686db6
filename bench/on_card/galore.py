"""Whole weights by GaLore on the card (bench/card.py --galore): an optimizer step with and without refreshes, its peak.

A refresh looks for a matrix's subspace anew; a run's heaviest step is one of the first, in which an eighth of all
matrices do. Steady: as many as are due a step later on, about one where there are as many matrices as steps between.
Beside it stands what torchtune publishes of the same task on its card: full fine-tuning, 8-bit AdamW in the backward.
"""

import time
from typing import Any

import torch
from measuring import Found
from on_card.plans import Planned
from on_card.rows import Bench, Count, example_of, peaks, planned_figures, settle, speeds, timed
from shapes import as_lite_loads, random_model
from steps import found_out_of_memory, lite_step
from torch import nn

from lite.attention.branch_attention import install
from lite.memory.levers import Levers, pull
from lite.model import trained
from lite.optim.galore import GaLore
from lite.optim.projected import FIRST_STEPS
from lite.plan import refreshes

MODELS = {"llama-8b": "bf16", "qwen2.5-14b": "int8"}  # what the weights are stored in
BATCH = 8  # pairs of an optimizer step
# torchtune's README, "full finetune Llama-3.1-8B on one 4090": PagedAdamW8bit in the backward, 2 x 2,048 packed tokens.
PUBLISHED = {"card": "rtx-4090", "tflops": 165, "peak_gib": 18.9, "tokens_per_second": 1650}


def settings_of(storage: str) -> dict[str, Any]:
    """What the recipe of such a run sets beside what all rows do."""
    return {"galore": True, "int8_weights": storage == "int8", "batch_size": BATCH}


def galore_row(bench: Bench, name: str, storage: str, plan: Planned) -> Found:
    """Seconds and tokens a second of whole steps, and the peak of the heaviest one."""
    recipe, shape = plan.recipe, bench.shapes[name]
    found: Found = planned_figures(plan)

    def make() -> nn.Module:
        model = as_lite_loads(random_model(shape, storage, bench.device))
        made = trained.attach(model, recipe)
        install(made)
        pull(made, Levers.of(recipe))
        return made.train()

    start = time.perf_counter()
    try:
        model, found["build_s"] = bench.held(("galore", name), make)
        row = tuple(size * BATCH for size in plan.row)
        step, update = lite_step(model, [example_of("orpo", plan.row, shape) for _ in range(BATCH)], recipe)
        assert isinstance(update, GaLore)
        for kind, count in {"heaviest": 1, "steady": 3, "without refresh": 3}.items():
            # The first kind warms up by a step of its own.
            at = _placed(update, kind)
            if kind == "heaviest":
                step()
                _placed(update, kind)
            before = sum(one.refreshes for one in update.projected)
            one = timed(bench, step, Count(0, count))
            one |= speeds(one, row, 0.0)
            refreshed = sum(one.refreshes for one in update.projected) - before
            found[kind] = one | {"at_step": at, "refreshes_per_step": refreshed / count}
        found |= {key: found["steady"][key] for key in ("seconds", "tokens_per_second", "phases")}
        for key in peaks(bench):
            found[key] = max(found[kind][key] for kind in ("heaviest", "steady", "without refresh"))
        if "allocated_bytes" in found:
            found["ratio"] = plan.peak_bytes / found["allocated_bytes"]
        settle(model, bench)
    except torch.OutOfMemoryError as error:
        found |= found_out_of_memory(error)
    return found | {"published": PUBLISHED, "took_s": time.perf_counter() - start}


def _placed(update: GaLore, kind: str) -> int | None:
    """Let the optimizer's next step be one of that kind; which of a run's."""
    shapes = [refreshes.Shape.of(one.matrix) for one in update.projected]
    first = update.projected[0]
    at = {
        "heaviest": refreshes.heaviest(shapes, first.settings, first.matrix.basis.dtype)[0],
        "steady": FIRST_STEPS + first.settings.update_interval // 2,
        "without refresh": None,
    }[kind]
    refreshes.place(update, at)
    return at
