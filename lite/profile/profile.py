"""`lite profile`: the first steps of a run, or the one with the largest pack of all, measured.

The steps are those that training would take, on the model and the rows of the recipe; nothing is trained in the end.
Times are taken first, with nobody else watching; then one more step is taken under the meter, which slows it down; on
CUDA a third kind, under torch's own record of allocations.
"""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lite.data.batches import plan_batches
from lite.data.packing import pack_sizes
from lite.data.packs import Batch, Layout
from lite.data.prepare import Prepared
from lite.engine import step
from lite.engine.layout import TOKENS_PER_PACK
from lite.engine.optimizer import clip, optimizer
from lite.errors import RecipeError
from lite.memory import marks
from lite.memory.meter import CUDA_GRANULE
from lite.model import load, trained
from lite.model.rotary import regimes
from lite.plan import dry_run
from lite.profile.clock import Clock
from lite.profile.timeline import Timeline
from lite.recipe import Recipe
from lite.train import failures, machine, run
from lite.train.batches import Batches
from lite.train.memory import plan_run
from lite.train.progress import Progress, Quiet
from lite.train.work import Work, planned_steps, read, set_up

PROFILE, TIMELINE, SNAPSHOT = "profile.json", "timeline.json", "memory_snapshot.pickle"
ALLOCATIONS = 200_000  # that torch's record may hold


@dataclass(frozen=True)
class Profile:
    """What was measured, and the folder that holds it: profile.json, timeline.json, on CUDA memory_snapshot.pickle."""

    folder: Path
    result: dict[str, Any]
    parts: dict[str, list[int]]  # live bytes of each, at each point of the metered step
    phases: list[tuple[int, str]]  # the first point of each


def profile(
    recipe: Recipe,
    *,
    steps: int = 3,
    prove: bool = False,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure `steps` steps of the recipe's run after one to warm up; with `prove` each time that of the largest pack.

    Raises a LiteError for what the user can mend, memory that runs out included.
    """
    if steps < 1:
        raise RecipeError(f"--steps {steps}: expected at least 1.")
    if recipe.output_dir is not None:
        raise RecipeError(f"output_dir = {recipe.output_dir}: that is for a run. A profile goes where --output says.")
    progress = progress or Quiet()
    with failures.told(progress, failures.lower(recipe)), ExitStack() as open_until:
        recipe = trained.settle(recipe)
        tokenizer, data = read(recipe, progress)
        # Of all rows, as the run's own plan. Whether it fits is what a profile finds out.
        recipe, plan = plan_run(recipe, data, planned_steps(recipe, data), progress, go_on=True)
        data = replace(data, held_out=[], held_out_examples=[])  # nothing is judged
        if prove:
            data = _proving(recipe, data, progress)
        # As many steps as are taken, so that of a reference no more is computed than they need.
        short = recipe.model_copy(update={"max_steps": min(steps + 1, planned_steps(recipe, data))})
        work = set_up(short, tokenizer, data, progress, open_until=open_until, plan=plan)
        folder = _folder(recipe, folder)
        progress.stage("measuring a step" if steps == 1 else f"measuring {steps} steps")
        timed, memory = _timed(work, steps, folder)
        progress.stage("counting the bytes of a step")
        largest = max((one.batch for one in timed), key=_largest)
        timeline = _metered(work, largest)
    parts, phases = timeline.thinned()
    result = {
        "profile": str(folder),
        "method": recipe.method,
        "model": recipe.model,
        "proved": prove,
        **_times(timed),
        "largest_pack_tokens": _largest(largest),
        "planned_bytes": plan.peak_bytes if plan else None,
        **_bytes(timeline),
        **memory,
        "recipe": work.recipe.resolved() | {"max_steps": recipe.max_steps},
        "environment": machine.environment(work.model.device),
    }
    run.write_json(folder / PROFILE, result)
    run.write_json(folder / TIMELINE, {"operators": timeline.operators, "phases": phases, "parts": parts})
    return Profile(folder, result, parts, phases)


class _Timed(NamedTuple):
    """A step that was taken."""

    batch: Batch
    clock: Clock


def _proving(recipe: Recipe, data: Prepared, progress: Progress) -> Prepared:
    """The rows of that step of the run, of any epoch, which has the largest pack; nothing is laid out for it."""
    rotary = regimes(load.config_of(recipe))
    layout = Layout(
        recipe.signature.completions,
        tokens_per_pack=recipe.tokens_per_pack or TOKENS_PER_PACK,
        padded=recipe.attn_implementation == "padded",
        split_pairs=bool(recipe.split_pairs),
        rotary_bound=rotary.bound,
        rotary_grows=rotary.grows,
    )
    planned = planned_steps(recipe, data)
    most, worst, left, epoch = 0, [], planned, 0
    while left > 0:
        members = plan_batches(data.train, layout, batch_size=recipe.batch_size, seed=recipe.seed, epoch=epoch).members
        for one in members[:left]:
            size = max(pack_sizes([data.train[i] for i in one], layout))
            if size > most:
                most, worst = size, one
        left, epoch = left - len(members), epoch + 1
    progress.note(f"the largest pack of {planned:,} steps: {most:,} tokens")
    return replace(data, train=[data.train[i] for i in worst], train_examples=[data.train_examples[i] for i in worst])


def _timed(work: Work, steps: int, folder: Path) -> tuple[list[_Timed], dict[str, int]]:
    """The steps after one that warms up, and the most memory taken in them; torch's record of one goes to `folder`."""
    device, batches = work.model.device, work.batches
    update = optimizer(work.model, work.recipe, work.scalars)
    work.model.train()
    taken = [_step(work, batches, 0, update)]
    machine.make_ready(device)
    taken += [_step(work, batches, i % len(batches), update) for i in range(1, steps + 1)]
    if device.type != "cuda":
        return taken[1:], {"process_bytes": machine.peak_bytes(device)}
    memory = {
        "allocated_bytes": machine.peak_bytes(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
    torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
    _step(work, batches, max(range(1, steps + 1), key=lambda i: _largest(taken[i].batch)) % len(batches), update)
    torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))
    torch.cuda.memory._record_memory_history(enabled=None)
    return taken[1:], memory


def _step(work: Work, batches: Batches, index: int, update: torch.optim.Optimizer) -> _Timed:
    """What training does in a step, watched by a clock."""
    clock = Clock(work.model.device)
    with clock, marks.watching(clock):
        marks.phase("data")
        batch = batches[index]
        step.backward(work.model, batch, work.objective, work.path)
        marks.phase("update")
        if work.recipe.max_grad_norm:
            clip(update, work.model.parameters(), work.recipe.max_grad_norm)
        marks.phase("data")
        batches.prepare((index + 1) % len(batches), work.model.device)
        marks.phase("update")
        update.step()
        update.zero_grad()
        marks.phase("idle")
    return _Timed(batch, clock)


def _metered(work: Work, batch: Batch) -> Timeline:
    """The same step as a plan's, on the real model: its live bytes."""
    granule = CUDA_GRANULE if work.model.device.type == "cuda" else 1
    timeline = Timeline(granule=granule, words=dry_run.words_of(work.model))
    with marks.watching(timeline):
        dry_run.run(work.model, batch, work.recipe, work.path, work.objective, work.scalars, timeline)
    return timeline


def _times(timed: Sequence[_Timed]) -> dict[str, Any]:
    """Medians over the steps, and each step by itself."""
    names = dict.fromkeys(name for one in timed for name in one.clock.seconds)
    tokens = [one.batch.tokens for one in timed]
    by_phase = {name: statistics.median(one.clock.seconds.get(name, 0.0) for one in timed) for name in names}
    each = [{"tokens": one.batch.tokens, "seconds": one.clock.total_s, "phases": one.clock.seconds} for one in timed]
    return {
        "steps": len(timed),
        "tokens": statistics.median(tokens),
        "seconds": statistics.median(one.clock.total_s for one in timed),
        "tokens_per_second": sum(tokens) / sum(one.clock.total_s for one in timed),
        "phases": by_phase,
        "each": each,
    }


def _bytes(timeline: Timeline) -> dict[str, Any]:
    """The peak as it was counted: which phase it is in, and what it is made of."""
    return {
        "peak_bytes": timeline.top["device"],
        "peak_in": timeline.phase_at_top,
        "parts": dict(dry_run.parts_of(timeline)),
        "peaks": dict(timeline.peaks),
        "host_bytes": timeline.top["host"],
    }


def _largest(batch: Batch) -> int:
    return max(pack.tokens for pack in batch.packs)


def _folder(recipe: Recipe, folder: Path | None) -> Path:
    if folder is None:
        return run.new_folder(recipe, kind="profile-")
    return run.new_folder(recipe.model_copy(update={"output_dir": str(folder)}))
