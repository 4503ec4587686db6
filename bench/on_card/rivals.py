"""The rivals' rows of bench/card.py: plain transformers + peft as a user writes it, and TRL's trainer.

Their models are made anew, with transformers' own modules and peft's own layers, and nothing of lite's in them. The
setting is a user's: gradient checkpointing, two padded rows, sdpa, weights that are not quantised left in bf16 (peft's
`prepare_model_for_kbit_training` would double them).
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from contenders import LORA
from measuring import Found
from on_card.flops import work
from on_card.rows import WARM_UP, Bench, Count, example_of, peaks, settle, speeds, timed
from shapes import random_model
from steps import found_out_of_memory, plain_step, trl_steps
from torch import nn

from lite.model import catalog


def plain_row(bench: Bench, name: str, method: str, row: tuple[int, ...]) -> Found:
    """Steps as a user of transformers + peft takes them; without the cap as well where they do not fit under it."""
    shape = bench.shapes[name]
    model, build_s = bench.held(("plain", name), lambda: plain_model(bench, shape))
    example = example_of(method, row, shape)
    own = padded_work(shape, row)
    found: Found = {"build_s": build_s}

    def steps() -> Found:
        outcome: Found = {}
        try:
            outcome = timed(bench, plain_step(model, example, method)[0], Count(WARM_UP, bench.repeats))
        except torch.OutOfMemoryError as error:
            outcome = found_out_of_memory(error)
        settle(model, bench)
        return outcome | speeds(outcome, row, own)

    return found | capped(bench, steps)


def trl_row(bench: Bench, name: str, method: str, row: tuple[int, ...]) -> Found:
    """TRL's steps, its own trainer around them."""
    shape = bench.shapes[name]

    def steps() -> Found:
        bench.free()
        watch, model = _Watch(bench), None
        outcome: Found = {}
        with tempfile.TemporaryDirectory() as folder:
            try:
                model = random_model(shape, "nf4", bench.device)
                count = WARM_UP + bench.repeats
                with contextlib.redirect_stdout(sys.stderr):  # it prints its metrics
                    trl_steps(model, row, count, watch, checkpointed=True, folder=folder, method=method)
                outcome = watch.outcome()
            except torch.OutOfMemoryError as error:
                outcome = found_out_of_memory(error)
        del model, watch
        bench.free()
        return outcome | speeds(outcome, row, padded_work(shape, row))

    return capped(bench, steps)


def plain_model(bench: Bench, shape: catalog.Shape) -> nn.Module:
    """transformers' model with peft's own layers, every layer recomputed by transformers' own switch."""
    from peft import LoraConfig, get_peft_model

    model = random_model(shape, "nf4", bench.device)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted


def capped(bench: Bench, steps: Callable[[], Found]) -> Found:
    """What steps find under the cap; `uncapped`, what they find without it, where memory runs out."""
    found = steps()
    if "out_of_memory" not in found or not bench.cap_bytes:
        return found
    bench.cap(False)
    without = steps()
    bench.cap()
    return found | {"uncapped": without}


def padded_work(shape: catalog.Shape, row: tuple[int, ...]) -> float:
    """Operations of a padded step, every layer recomputed, the head on every position."""
    scored = len(row[1:]) * (row[0] + max(row[1:]))
    return work(shape, row[0], row[1:], shared=False, scored=scored).total(1.0, last_again=True)


class _Watch:
    """Told by TRL's trainer before and after each step."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.seconds, self.taken = bench, [], 0

    def before(self, *_: object) -> None:
        self.bench.wait()
        if self.taken == WARM_UP and self.bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.bench.device)
        self.start = time.perf_counter()

    def after(self) -> None:
        self.bench.wait()
        if self.taken >= WARM_UP:
            self.seconds.append(time.perf_counter() - self.start)
        self.taken += 1

    def outcome(self) -> Found:
        found = {"steps": len(self.seconds), "warm_up": WARM_UP, "seconds": statistics.median(self.seconds)}
        return found | {"each": self.seconds, **peaks(self.bench)}
