"""After each step: the line of speed.jsonl, the progress bar, what is due, and the end if a signal has asked for it."""

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lite.train import machine, metrics
from lite.train.interrupt import Request

if TYPE_CHECKING:
    from lite.train.trainer import Trainer


class Watch(TrainerCallback):
    """What happens after each step of a trainer; request: whether a signal has asked the run to stop."""

    def __init__(self, trainer: "Trainer", request: Request) -> None:
        self.trainer = trainer
        self.request = request

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Tell of the step that is done, and say what Trainer has to do next."""
        trainer = self.trainer
        if trainer.galore:
            trainer.norms = trainer.galore.told() or trainer.norms
        # Trainer's epoch is the whole run here; users mean a pass over their rows.
        state.epoch = state.global_step / trainer.batches.steps_per_epoch
        seconds = time.perf_counter() - trainer.started
        tokens = trainer.latest["tokens"]
        speed = {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "memory_bytes": machine.peak_bytes(args.device),
        }
        if trainer.planned:
            speed["planned_bytes"] = trainer.planned.planned_bytes
            trainer.progress.note(trainer.planned.told(args.device))
            trainer.planned = None
        metrics.append(trainer.folder / metrics.SPEED, {"step": state.global_step, **speed})
        trainer.progress.step(state.global_step, {**trainer.latest, **speed})
        if state.global_step == state.max_steps:
            control.should_log = True  # or the steps since the last line would be in none
        if trainer.score and state.global_step % args.save_steps == 0 and state.global_step < state.max_steps:
            control.should_evaluate = True  # what a checkpoint is worth; the last one is evaluated when all is done
        if self.request.asked:
            control.should_save = control.should_training_stop = True
        return control
