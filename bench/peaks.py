"""The peak and the speed of one contender's steps: lite under a lever, plain transformers + peft, or TRL.

On a CPU a peak is told by three witnesses. `allocator_bytes`: what is there before a step, and the highest sum of
torch's own memory events in it. `resident_bytes`: the same, and by how much the process's resident memory rose above
what it was before a step. `planned_bytes`: the plan's, of lite. On CUDA `allocator_bytes` is torch's own peak.
"""

import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from contenders import LORA
from measuring import Found, peak_bytes
from shapes import as_lite_loads, compute_dtype, random_example, random_model, shape_named
from steps import found_out_of_memory, lite_step, pair_sizes, plain_step, trl_steps
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from lite.attention.branch_attention import install
from lite.memory.host import host_tensors
from lite.memory.levers import Levers, pull
from lite.memory.meter import frozen_tensors
from lite.model import adapters, catalog
from lite.plan.lengths import Lengths, Row
from lite.plan.target import at_hand
from lite.plan.trials import Settings, Trials
from lite.recipe import Recipe
from lite.train import machine

FEW_LAYERS = 12  # up to here a plan runs the whole model; more layers by the law of a few
REST = {"recompute_layers": 0, "keep_attention": False, "offload_checkpoints": False, "embedding_on_host": False,
        "mlp_tile_tokens": 0, "layers_on_host": 0, "split_pairs": False, "chunk_tokens": 512}  # fmt: skip
ALL, HALF = "all", "half"
# Each lever beside the recomputation of all layers, without which most of them are nothing.
LEVERS: dict[str, dict[str, Any]] = {
    "none": {},
    "recompute half": {"recompute_layers": HALF},
    "recompute all": {"recompute_layers": ALL},
    "all but attention": {"recompute_layers": ALL, "keep_attention": True},
    "small chunk": {"recompute_layers": ALL, "chunk_tokens": 128},
    "MLP in tiles": {"recompute_layers": ALL, "mlp_tile_tokens": 256},
    "embedding on host": {"recompute_layers": ALL, "embedding_on_host": True},
    "offload": {"recompute_layers": ALL, "offload_checkpoints": True},
    "layers on host": {"recompute_layers": ALL, "layers_on_host": ALL},
}
TOGETHER = [LEVERS[name] for name in ("small chunk", "MLP in tiles", "embedding on host", "offload", "layers on host")]
LEVERS["all together"] = {key: value for lever in TOGETHER for key, value in lever.items()}
OTHERS = ("plain", "plain, recompute", "trl", "trl, recompute")


@dataclass(frozen=True)
class Case:
    """What is measured: a shape's name, what its matrices are stored in, and a contender: a lever or another's code."""

    model: str
    storage: str
    contender: str
    device: torch.device

    @property
    def shape(self) -> catalog.Shape:
        """The model's."""
        return shape_named(self.model)

    def recipe(self, tokens: int) -> Recipe:
        """lite's, with its levers, for a pack of so many tokens."""
        counts = {ALL: self.shape.layers, HALF: self.shape.layers // 2}
        settings = {
            key: counts[value] if value in (ALL, HALF) and isinstance(value, str) else value
            for key, value in (REST | LEVERS[self.contender]).items()
        }
        if self.device.type == "cuda" and settings["mlp_tile_tokens"]:
            settings["mlp_tile_tokens"] = 2048  # a card's products want more rows than a CPU's
        dtype = compute_dtype(self.storage, self.device)
        return Recipe(
            method="orpo", model="bundled", device=self.device.type, load_in_4bit=self.storage == "nf4",
            dtype="float32" if dtype == torch.float32 else "bfloat16", tokens_per_pack=tokens, max_length=2 * tokens,
            lora_r=LORA["r"], lora_alpha=float(LORA["lora_alpha"]), **settings,
        )  # fmt: skip


class Watch:
    """Told before and after each step. The first makes states and warms up, the second is profiled on a CPU."""

    FIRST_TIMED = 2

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps = device, 0
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.found: Found = {}

    def before(self, model: nn.Module, update: torch.optim.Optimizer) -> None:
        """A step begins."""
        if self.steps == 1 and self.device.type == "cpu":
            self.found["static_bytes"] = static_bytes(model, update)
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()
        if self.steps == self.FIRST_TIMED:
            gc.collect()
            machine.make_ready(self.device)
            self.resident = psutil.Process().memory_info().rss
        self._wait()
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def after(self) -> None:
        """It has ended."""
        self._wait()
        if self.steps >= self.FIRST_TIMED:
            self.seconds.append(time.perf_counter() - self.start)
            self.cpu_seconds.append(time.process_time() - self.cpu_start)
        elif self.steps == 1 and self.device.type == "cpu":
            self.profiler.__exit__(None, None, None)
            self.found["allocator_bytes"] = self.found["static_bytes"] + _highest(self.profiler)
            del self.profiler
        self.steps += 1

    def outcome(self) -> Found:
        """All that was seen."""
        if self.device.type == "cuda":
            self.found["allocator_bytes"] = torch.cuda.max_memory_allocated()
            self.found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        else:
            self.found["resident_bytes"] = self.found["static_bytes"] + peak_bytes() - self.resident
        return {
            **self.found,
            "seconds": statistics.median(self.seconds),
            "cpu_seconds": statistics.median(self.cpu_seconds),
        }

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measured(case: Case, lengths: list[int], repeats: int) -> Iterator[tuple[int, Found]]:
    """Steps of each length on one model; what does not fit is told, and no longer one is tried."""
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    model = None
    for tokens in lengths:
        watch = Watch(case.device)
        try:
            if case.contender.startswith("trl"):
                _trl(case, tokens, watch, repeats)
            else:
                model = model or _model(case, tokens)
                _repeated(case, model, tokens, watch, repeats)
        except torch.OutOfMemoryError as error:
            yield tokens, found_out_of_memory(error)
            return
        yield tokens, watch.outcome()


def planned(case: Case, lengths: list[int]) -> dict[int, Found]:
    """What a plan says of a lever of lite's at each length: bytes on the device and on the host, seconds."""
    if case.contender not in LEVERS:
        return {}
    found = {}
    for tokens in lengths:
        recipe = case.recipe(tokens)
        row = Row(pair_sizes(tokens)[0], pair_sizes(tokens)[1:])
        trials = Trials(recipe, catalog.config(case.shape), Lengths(row, None, tokens, tokens, row), at_hand(recipe))
        levers = Levers.of(recipe)
        settings = Settings(tokens, recipe.chunk_tokens, False, levers)
        if trials.layers <= FEW_LAYERS:
            outcome = trials.outcome(settings, tokens)
            peak, host, seconds = outcome.peak_bytes, outcome.host_bytes, outcome.cost.step_seconds()
        else:
            counts = levers.recompute_layers, trials.layers - levers.recompute_layers
            law = trials.law(settings, tokens, kept=counts[1] > 0, recomputed=counts[0] > 0)
            peak, host, seconds = law.peak_bytes(*counts), law.host_bytes(*counts), law.seconds(*counts)
        found[tokens] = {"planned_bytes": round(peak), "planned_host_bytes": round(host), "planned_seconds": seconds}
    return found


def static_bytes(model: nn.Module, update: torch.optim.Optimizer) -> int:
    """What lies in memory before a step: weights, their scales, adapters, the optimizer's states."""
    states = [leaf for state in update.state.values() for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    tensors = itertools.chain(frozen_tensors(model), model.parameters(), host_tensors(model), states)
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _model(case: Case, tokens: int) -> nn.Module:
    """The contender's model with its adapter, ready to train."""
    model = random_model(case.shape, case.storage, case.device)
    if case.contender in LEVERS:
        recipe = case.recipe(tokens)
        adapted = adapters.attach(as_lite_loads(model), recipe)
        pull(adapted, Levers.of(recipe))
        install(adapted)
        return adapted.train()
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA)).train()
    if case.contender.endswith("recompute"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted


def _repeated(case: Case, model: nn.Module, tokens: int, watch: Watch, repeats: int) -> None:
    example = random_example(*pair_sizes(tokens), case.shape.vocab_size)
    if case.contender in LEVERS:
        step, update = lite_step(model, [example], case.recipe(tokens))
    else:
        step, update = plain_step(model, example)
    for _ in range(Watch.FIRST_TIMED + repeats):
        watch.before(model, update)
        step()
        watch.after()


def _trl(case: Case, tokens: int, watch: Watch, repeats: int) -> None:
    model = random_model(case.shape, case.storage, case.device)
    checkpointed, standard_output = case.contender.endswith("recompute"), sys.stdout
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout = sys.stderr  # it prints its metrics
        try:
            steps = Watch.FIRST_TIMED + repeats
            trl_steps(model, pair_sizes(tokens), steps, watch, checkpointed=checkpointed, folder=folder)
        finally:
            sys.stdout = standard_output


def _highest(profiler: profile) -> int:
    """The highest sum of the memory events."""
    events: list[Any] = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sums = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()))
    return max(sums, default=0)


def whole_planned(found: Mapping[str, Any]) -> int:
    """What a plan says of device and host together, which on a CPU are one."""
    return found["planned_bytes"] + found["planned_host_bytes"]
