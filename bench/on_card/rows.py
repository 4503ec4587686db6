"""lite's rows of bench/card.py: steps on one kind of example as the planner settles them, timed and weighed.

A model is made where it computes and is alone in memory. Steps follow each other unwatched, as in a run; what is told
of a step's parts comes from events in the stream.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from measuring import Found
from on_card.flops import work
from on_card.plans import Planned
from shapes import as_lite_loads, random_example, random_model
from steps import Step, found_out_of_memory, lite_step
from torch import nn

from lite.attention.branch_attention import install
from lite.data.examples import TokenExample
from lite.memory import marks
from lite.memory.levers import Levers, pull
from lite.model import adapters, catalog
from lite.profile.clock import Clock

FOR_GOOD = {"embedding_on_host": False, "mlp_tile_tokens": 0, "layers_on_host": 0}  # levers that stay pulled
WARM_UP = 2  # steps: the first makes states and compiles, the second finds its memory
SHORT_S = 4.0  # a planned step that takes longer is warmed up by one of WARM_PAIR
WARM_PAIR = (64, 64, 64)
ROW_S = 20.0  # that a row's timed steps may take in all


@dataclass
class Bench:
    """Where rows are measured, and the one model that is there."""

    device: torch.device
    repeats: int
    cap_bytes: int | None  # that torch may reserve
    shapes: dict[str, catalog.Shape]
    key: tuple[Any, ...] | None = None
    model: Any = field(default=None, repr=False)

    def held(self, key: tuple[Any, ...], make: Callable[[], nn.Module]) -> tuple[nn.Module, float]:
        """The model of that key, and the seconds that it took to make, 0 if it is there; any other is let go."""
        if self.key == key:
            return self.model, 0.0
        self.free()
        start = time.perf_counter()
        self.model, self.key = make(), key
        self.wait()
        return self.model, time.perf_counter() - start

    def free(self) -> None:
        """Let the model go, and what torch keeps of its memory."""
        self.model = self.key = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def cap(self, on: bool = True) -> None:
        """Let torch have no more of the card than the cap, or all of it."""
        if self.cap_bytes and self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.cap_bytes / total) if on else 1.0, self.device)

    def wait(self) -> None:
        """Until the card has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def lite_row(bench: Bench, name: str, plan: Planned) -> Found:
    """lite's steps under what was planned."""
    recipe, shape = plan.recipe, bench.shapes[name]
    levers = Levers.of(recipe)
    key = ("lite", name, *(getattr(levers, lever) for lever in FOR_GOOD))

    def make() -> nn.Module:
        model = adapters.attach(as_lite_loads(random_model(shape, "nf4", bench.device)), recipe)
        pull(model, levers)
        install(model)
        return model.train()

    model, build_s = bench.held(key, make)
    if not build_s:
        pull(model, replace(levers, **FOR_GOOD))
    examples = [example_of(recipe.method, plan.row, shape) for _ in range(recipe.batch_size)]
    count = repeats_of(bench, plan.step_seconds)
    found = {"build_s": build_s, **planned_figures(plan)}
    try:
        if count.warm == 0:  # one pack as long as that fills the time: what is compiled and kept is made by a short one
            short = [example_of(recipe.method, WARM_PAIR[: len(plan.row)], shape)]
            lite_step(model, short, recipe.model_copy(update={"tokens_per_pack": None}))[0]()
        step, update = lite_step(model, examples, recipe)
        if count.warm == 0:
            states_of(update, model)
        found |= timed(bench, step, count)
    except torch.OutOfMemoryError as error:
        found |= found_out_of_memory(error)
    settle(model, bench)
    layers = shape.layers
    own = work(shape, plan.row[0], plan.row[1:], rank=recipe.lora_r)
    again = min(levers.recompute_layers, layers) / layers
    found |= speeds(found, plan.row, own.total(again, keep_attention=levers.keep_attention))
    if "allocated_bytes" in found:
        found["ratio"] = plan.peak_bytes / found["allocated_bytes"]
    return found


@dataclass(frozen=True)
class Count:
    """Of steps before and while it is measured."""

    warm: int
    timed: int


def repeats_of(bench: Bench, planned_s: float) -> Count:
    """As many steps as a row has time for."""
    if bench.device.type != "cuda":
        return Count(0 if planned_s > SHORT_S else WARM_UP, bench.repeats)
    return Count(0 if planned_s > SHORT_S else WARM_UP, max(1, min(bench.repeats, int(ROW_S / planned_s))))


def timed(bench: Bench, step: Step, count: Count) -> Found:
    """Median seconds of steps that follow each other unwatched, seconds by phase, and the peak of their memory."""
    for _ in range(count.warm):
        step()
    gc.collect()
    bench.wait()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    clock, borders = Clock(bench.device), []
    with clock, marks.watching(clock):
        for _ in range(count.timed):
            borders.append(_moment(bench.device))
            step()
        borders.append(_moment(bench.device))
    seconds = [_between(one, other) for one, other in itertools.pairwise(borders)]
    phases = {name: total / count.timed for name, total in clock.seconds.items() if name != "idle"}
    return {
        "steps": count.timed, "warm_up": count.warm, "seconds": statistics.median(seconds), "each": seconds,
        "phases": phases, **peaks(bench),
    }  # fmt: skip


def peaks(bench: Bench) -> Found:
    """The most memory since it was last forgotten; on a CPU nothing, where bench/memory.py is for that."""
    if bench.device.type != "cuda":
        return {}
    allocated = torch.cuda.max_memory_allocated(bench.device)
    return {"allocated_bytes": allocated, "reserved_bytes": torch.cuda.max_memory_reserved(bench.device)}


def speeds(found: Found, row: tuple[int, ...], operations: float) -> Found:
    """Tokens (a prompt counted once, whoever computes it twice) and operations a second."""
    if "seconds" not in found:
        return {"tflop": operations / 1e12}
    seconds = found["seconds"]
    return {
        "tflop": operations / 1e12, "tflop_per_second": operations / 1e12 / seconds,
        "tokens_per_second": sum(row) / seconds,
    }  # fmt: skip


def planned_figures(plan: Planned) -> Found:
    """What the table shows of a plan."""
    return {
        "settings": plan.settings, "fits": plan.fits, "planned_bytes": plan.peak_bytes,
        "planned_host_bytes": plan.host_bytes, "planned_seconds": plan.step_seconds,
        "operators_per_layer": plan.operators_per_layer,
    }  # fmt: skip


def example_of(method: str, row: tuple[int, ...], shape: catalog.Shape) -> TokenExample:
    """Random tokens; SFT learns one completion."""
    example = random_example(row[0], row[1], row[2] if len(row) > 2 else 1, shape.vocab_size)
    return replace(example, completions=example.completions[: len(row) - 1])


def states_of(update: torch.optim.Optimizer, model: nn.Module) -> None:
    """Let the optimizer have its states, by a step of zeros."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    update.step()
    update.zero_grad()


def settle(model: nn.Module, bench: Bench) -> None:
    """Forget what a step that was cut short has left."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def _moment(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(begun: Any, ended: Any) -> float:
    return begun.elapsed_time(ended) / 1e3 if isinstance(begun, torch.cuda.Event) else ended - begun
