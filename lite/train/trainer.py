"""The Trainer of transformers, with the few methods replaced that would train wrongly here.

One Trainer batch is the packs of one optimizer step, and one Trainer epoch is the whole run: the data set is the lazy
sequence of its batches, in order, so that a step's number says which rows it sees. Left to Trainer: the loop, clipping,
trackers, and the state that a checkpoint needs. Replaced, each for a reason given there: the step, the schedule, the
log, the evaluation, and how checkpoints are written and read.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback

from lite.data.packs import Batch
from lite.engine import step
from lite.engine.forward import Path as ForwardPath
from lite.engine.objective import Objective
from lite.engine.optimizer import clip, kinds_in_state, optimizer
from lite.engine.scalars import Scalars
from lite.model import trained, whole
from lite.model.trained import Trained
from lite.optim.galore import GaLore
from lite.recipe import Recipe
from lite.train import checkpoints, failures, metrics
from lite.train.arguments import arguments
from lite.train.batches import Batches
from lite.train.interrupt import Request
from lite.train.memory import Comparison
from lite.train.progress import Progress
from lite.train.recovery import Room
from lite.train.refresh import Refresh
from lite.train.schedule import schedule
from lite.train.watch import Watch

STATE = "lite.json"  # in a checkpoint: what lite adds to Trainer's own state


class Trainer(transformers.Trainer):
    """Trains a model on the batches of a run. Raises RunError at a loss or gradient that is not finite."""

    def __init__(
        self,
        model: Trained,
        recipe: Recipe,
        batches: Batches,
        *,
        objective: Objective,
        scalars: Scalars,
        refresh: Refresh | None,
        path: ForwardPath,
        room: Room,
        evaluate: Callable[[Path, int], dict[str, float]] | None,
        folder: Path,
        progress: Progress,
        request: Request,
    ) -> None:
        self.recipe = recipe
        self.batches = batches
        self.objective = objective
        self.scalars = scalars
        self.refresh = refresh
        self.path = path
        self.room = room
        self.split_told = False
        self.score = evaluate
        self.folder = folder
        self.progress = progress
        self.interval = metrics.Interval()
        self.norms: dict[str, Tensor | float] = {}  # of the interval's latest refresh of subspaces
        self.planned: Comparison | None = None  # until the first step's peak is known
        super().__init__(
            model=model,
            args=arguments(recipe, folder, len(batches), device=model.device, evaluates=evaluate is not None),
            train_dataset=batches,
            eval_dataset=[],  # evaluation is `evaluate`; Trainer only wants to see that there is something
            callbacks=[Watch(self, request)],
        )
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader:
        """The batches in their order; each is one item, already laid out."""
        return DataLoader(self.batches, batch_size=1, shuffle=False, collate_fn=_only)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        """The next batch. Its normaliser is known to the step, so nothing is counted here."""
        self.started = time.perf_counter()
        if self.refresh and self.refresh.is_due(self.state.global_step):
            self.merge()
            # Before the batch is laid out, for its reference is looked up then.
            self.refresh.take_over(self.state.global_step, self.batches, self._references())
        return [next(epoch_iterator)], None

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of all packs of the batch; the detached loss. Nothing is fetched from the device yet."""
        model.train()
        self.current = inputs
        result = self.room.within(
            f"step {self.state.global_step + 1}",
            lambda: step.backward(model, self.current, self.objective, self.path),
            lambda: (self.batches.examples(self.state.global_step), max(pack.tokens for pack in self.current.packs)),
            self._begin_again,
        )
        if self.current.spread and not self.split_told:
            self.split_told = True
            self.progress.note("pairs over tokens_per_pack are computed one completion at a time: the same gradient")
        self.found = {"loss": result.loss, **result.averages}
        return result.loss

    def _begin_again(self) -> None:
        """Nothing of a step that failed is left, and its examples are laid out as there is room now."""
        for parameter in [*self.model.parameters(), *self.scalars.values.values()]:
            parameter.grad = None
        if self.galore:
            self.galore.zero_grad()
        self.current = self.batches[self.state.global_step]

    @property
    def galore(self) -> GaLore | None:
        """The optimizer, if it is GaLore; not what accelerate wraps around it."""
        bare = getattr(self.optimizer, "optimizer", self.optimizer)
        return bare if isinstance(bare, GaLore) else None

    def merge(self) -> None:
        """Round what waits beside the weights into them, before they are taken for the model."""
        if self.galore:
            self.galore.merge()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Trainer's; of GaLore what it has gathered, for parameters have no gradients then."""
        if self.galore:
            return clip(self.galore, [], self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """The norm before clipping; and where a step is waited for, before the optimizer may use its gradient.

        Raises RunError if the loss or the norm is not finite.
        """
        if self.galore and grad_norm is None:
            grad_norm = clip(self.galore, [], 0.0)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        ahead = self.state.global_step + 1
        # All that the device has to do until then is queued, so that this costs no time of its own.
        if not (self.refresh and self.refresh.is_due(ahead)):
            self.batches.prepare(ahead, self.args.device)
        norm = norm.to(self.found["loss"].device)  # of no gradients at all it is a zero on the CPU
        # The step's one copy from the device; in float64 each number is itself.
        *numbers, norm = torch.stack([v.double() for v in (*self.found.values(), norm)]).tolist()
        values, tokens = dict(zip(self.found, numbers, strict=True)), self.current.tokens
        self._require_finite("loss", values["loss"], ahead)
        self._require_finite("gradient's norm", norm, ahead)
        self.interval.add(values, tokens)
        self.latest = {**{k: v for k, v in values.items() if not math.isnan(v)}, "tokens": tokens}
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *given: Any, **named: Any) -> None:
        """Trainer's, but for its own sum of the losses, for which it would wait again; `log` takes the interval's."""
        super()._maybe_log_save_evaluate(torch.zeros(()), *given, **named)

    def _require_finite(self, what: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise failures.not_finite(what, value, step, self.current, checkpoints.listed(self.folder / "checkpoints"))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of metrics.jsonl, and the trackers. Trainer's closing summary of times is left to speed.jsonl."""
        if "loss" in logs:
            averages = self.interval.averages()
            loss = averages.pop("loss")
            rates = {"grad_norm": float(logs["grad_norm"]), "learning_rate": logs["learning_rate"]}
            norms = {name: float(norm) for name, norm in self.norms.items()}
            self.norms = {}
            record = {"loss": loss, **rates, **norms, **averages, "num_tokens": self.interval.num_tokens}
        elif any(key.startswith("eval_") for key in logs):
            record = dict(logs)
        else:
            return
        place = {"step": self.state.global_step, "epoch": self.state.epoch or 0.0}
        metrics.append(self.folder / metrics.METRICS, {**place, **record})
        super().log(record, start_time)
        # It would hold every line again in each checkpoint; metrics.jsonl has them.
        self.state.log_history.clear()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out metrics, by lite's own pass: Trainer's takes a list of packs for a batch of one and weighs it so."""
        found = self.record_evaluation()
        self.progress.evaluation(f"at step {self.state.global_step}", found)
        # It also takes back the wish to evaluate, which Trainer looks at once more when the last step is done.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def record_evaluation(self) -> dict[str, float]:
        """Held-out metrics, written to metrics.jsonl under TRL's eval_ names."""
        scored = self.score(self.folder, self.state.global_step)
        found = {f"eval_{name}": value for name, value in scored.items()}
        self.log(dict(found))
        return found

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's."""
        if self.optimizer is None:
            self.optimizer = optimizer(self.model, self.recipe, self.scalars)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The recipe's, over the steps of the run."""
        if self.lr_scheduler is None:
            self.lr_scheduler = schedule(optimizer or self.optimizer, self.recipe, len(self.batches))
        return self.lr_scheduler

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: Trainer's count looks for input ids in the batch."""
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: None) -> None:
        """Staged, not in place: see checkpoints.write. Refused if the last update has broken the weights."""
        self._require_finite("largest weight after it", float(whole.largest(self.model)), self.state.global_step)
        parent = self.folder / "checkpoints"
        checkpoints.write(parent, self.state.global_step, self._fill)
        checkpoints.prune(parent, self.recipe.save_total_limit)
        if self.refresh:
            self.refresh.forget_but(self._references())

    def _references(self) -> set[int]:
        """After which steps the policy became the references that the checkpoints go on with; 0: it had not yet."""
        found = set()
        for kept in checkpoints.listed(self.folder / "checkpoints"):
            with suppress(OSError, ValueError, KeyError):  # a broken one, which a resume passes over as well
                found.add(state(kept)["refreshed"])
        return found

    def _fill(self, folder: Path) -> None:
        trained.save(self.model, folder)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))
        lengths = {name: metrics.size(self.folder / name) for name in (metrics.METRICS, metrics.SPEED)}
        state = {
            "lengths": lengths,
            "interval": asdict(self.interval),
            "norms": {name: float(norm) for name, norm in self.norms.items()},
            "steps": len(self.batches),
            "scalars": self.scalars.state(),
            "refreshed": self.refresh.step if self.refresh else 0,
            "packing": self.room.state(),
        }
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """What is trained, in its own dtype: Trainer would go through peft's load_adapter, which makes bf16 fp32."""
        folder = Path(resume_from_checkpoint)
        trained.load(self.model, folder)
        self.interval = metrics.Interval(**state(folder)["interval"])
        self.norms = state(folder).get("norms", {})  # not in a checkpoint of an earlier lite
        self.scalars.restore(state(folder)["scalars"])
        self.room.restore(state(folder)["packing"])
        if self.refresh:
            self.refresh.restore(state(folder)["refreshed"], folder, self.batches)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's; and if the run has been made longer, the learning rate of the longer schedule from here on."""
        with torch.serialization.safe_globals(kinds_in_state(self.recipe)):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and state(Path(checkpoint))["steps"] != len(self.batches):
            # The saved rate belongs to the shorter schedule: take the last step of the schedule again.
            self.lr_scheduler.last_epoch -= 1
            self.lr_scheduler.step()


def state(checkpoint: Path) -> dict[str, Any]:
    """What lite adds to a checkpoint: the lengths of the run's logs, the open interval, the steps of its schedule."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def _only(items: list[Batch]) -> Batch:
    return items[0]
