"""The story of a run: data, model, a look at both, the steps, another look, and the adapter or model that is left.

Resuming is the same story with fewer steps to go. Whatever a later part needs of an earlier one is in the run's folder
by then, so that a run that was killed and resumed leaves what an undisturbed one leaves: on a CPU, bit for bit.
"""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from transformers import GenerationConfig

from lite.data.template import AUTO, NONE
from lite.errors import ExportError, RunError
from lite.model import adapters, trained, trained_with, whole_files
from lite.model.head import unwrapped
from lite.model.origin import folder_of, weights_mark
from lite.recipe import Recipe
from lite.train import checkpoints, failures, interrupt, judged, left, machine, metrics, run, samples
from lite.train.memory import Comparison
from lite.train.progress import Progress, Quiet, in_mib
from lite.train.run import Run
from lite.train.trainer import Trainer, state
from lite.train.work import Work, loss_identity, read, set_up


def train(recipe: Recipe, progress: Progress | None = None) -> Run:
    """Train an adapter, or with `full` the weights themselves, as the recipe says; the finished run.

    Raises a LiteError for what the user can mend, and Interrupted, after a checkpoint, when asked by a signal to stop.
    """
    progress = progress or Quiet()
    with failures.told(progress, failures.lower(recipe)), ExitStack() as open_until:
        started = time.perf_counter()
        run.require_free(recipe)
        recipe = trained.settle(recipe)
        place = Path(recipe.output_dir or run.RUNS)
        work = set_up(recipe, *read(recipe, progress), progress, open_until=open_until, folder=place)
        folder = run.new_folder(recipe)
        # Not where it lies: so that the saved recipe, given to --recipe, makes a run of its own.
        work = replace(work, recipe=work.recipe.model_copy(update={"output_dir": None}))
        with run.alone(folder), run.going_on(folder):
            run.require_free(recipe)  # another process may have trained there while this one loaded
            _write_start(work, folder)
            progress.note(f"run: {folder}")
            return _carry_out(work, folder, None, started)


def resume(folder: str | Path, max_steps: int | None = None, progress: Progress | None = None) -> Run:
    """Go on with a run from its newest whole checkpoint, to what it would have been without a stop.

    `max_steps` may be higher than the run's: then the learning rate follows, from the checkpoint on, the schedule of
    the longer run (a cosine that had come down goes up again), so the result is not that of a run which was as long
    from its start. Raises RunError if the recipe, the data or the model have changed, naming what; a finished run is
    returned as it is, unless what it had left is gone: that is written again from its last checkpoint.
    """
    progress = progress or Quiet()
    folder = Path(folder)
    recipe = run.opened(folder)
    with failures.told(progress, failures.lower(recipe)), ExitStack() as open_until:
        started = time.perf_counter()
        result = run.result(folder)
        if result is not None and max_steps in (None, result["steps"]):
            if left.is_there(folder, recipe):
                done = f"{folder}: finished already, after {result['steps']} steps"
                progress.note(f"{done}. --max-steps makes it longer.")
                return Run(folder, recipe, result)
            last = left.require_checkpoint(folder, recipe)
            progress.note(f"{left.place(folder, recipe)}: is gone, and is written again, from {last.name}")
        if max_steps is not None and max_steps < run.planned_steps(folder):
            planned = run.planned_steps(folder)
            raise RunError(
                f"--max-steps {max_steps}: {folder} has {planned} planned, which may be raised, not lowered."
            )
        with run.alone(folder), run.going_on(folder):
            longer = recipe if max_steps is None else recipe.model_copy(update={"max_steps": max_steps})
            tokenizer, data = read(longer, progress)
            but = "max_steps" if max_steps is not None else ""
            now = {"recipe": longer.resolved(), "data": data.digest, "loss": loss_identity(longer)}
            run.require_same(folder, now, but=but)
            start_adapter = folder / run.START_ADAPTER
            kept = start_adapter if start_adapter.is_dir() else None
            places = {"folder": folder, "start_adapter": kept}
            work = set_up(longer, tokenizer, data, progress, open_until=open_until, **places, go_on=True)
            run.require_same(folder, {"model": work.identity()["model"]})
            if max_steps is not None:
                run.extend(folder, longer, work.identity())
            run.note_environment(folder, machine.environment(work.model.device), progress.note)
            return _carry_out(work, folder, _go_back(folder, progress), started)


def _write_start(work: Work, folder: Path) -> None:
    """The files that make the folder a run, which resume can go on with from now on."""
    if (start_adapter := adapters.continued_from(work.recipe)) is not None:
        run.keep_start_adapter(folder, start_adapter)
    notes = {run.ENVIRONMENT: machine.environment(work.model.device), run.LEDGER: work.data.ledger.to_dict()}
    if work.plan:
        notes[run.PLAN] = work.plan.to_dict()
    run.create(folder, work.recipe, work.identity(), notes, skipped=work.data.bad_rows)


def _carry_out(work: Work, folder: Path, checkpoint: Path | None, started: float) -> Run:
    """The steps from `checkpoint` on, with a look at the held-out rows before and after; the result in the folder."""
    recipe, progress, batches = work.recipe, work.progress, work.batches
    request = interrupt.Request(progress.stopping)
    done = checkpoints.step_of(checkpoint) if checkpoint else 0
    trainer = Trainer(
        work.model,
        recipe,
        batches,
        objective=work.objective,
        scalars=work.scalars,
        refresh=work.refresh(folder),
        path=work.path,
        room=work.room,
        evaluate=work.evaluate if work.data.held_out else None,
        folder=folder,
        progress=progress,
        request=request,
    )
    if checkpoint is None:
        _look(trainer, work, folder, "before")
    if work.plan:
        machine.make_ready(work.model.device)  # the peak is that of the steps
        trainer.planned = Comparison.of(work.plan, work.model.device)
    with interrupt.listening(request):
        if done < len(batches):
            progress.steps(len(batches), done)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if request.asked:
        raise interrupt.Interrupted(folder, trainer.state.global_step)
    trainer.merge()
    _look(trainer, work, folder, "after")
    _leave(work, folder)
    result = {
        "run": str(folder),
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started, 3),
        "peak_bytes": machine.peak_bytes(work.model.device),
        "packing": work.room.state(),
        "eval_before": metrics.evaluation(folder / metrics.METRICS, 0) or {},
        "eval_after": metrics.evaluation(folder / metrics.METRICS, trainer.state.global_step) or {},
    }
    if recipe.full:
        result["model"] = str(folder / trained.WHOLE)
    run.write_json(folder / run.RESULT, result)
    return Run(folder, recipe, result)


def _look(trainer: Trainer, work: Work, folder: Path, when: str) -> None:
    """Evaluate on the held-out rows, unless this step's evaluation is on record, and answer some of their prompts."""
    if not work.data.held_out:
        work.progress.note(f"no held-out rows: nothing to evaluate {when} training")
        return
    work.progress.stage(f"evaluating {when} training")
    found = metrics.evaluation(folder / metrics.METRICS, trainer.state.global_step) or trainer.record_evaluation()
    work.progress.evaluation(when, found)
    if work.recipe.samples:
        answered = samples.answers(work.model, work.tokenizer, work.data, work.recipe.samples)
        samples.save(folder, when, answered)
        work.progress.samples(when, answered)


def _go_back(folder: Path, progress: Progress) -> Path | None:
    """The checkpoint to go on from, with everything that was written after it forgotten; None to start over."""
    checkpoint = checkpoints.newest(folder / "checkpoints", progress.note)
    if checkpoint is None:
        progress.note(f"{folder}: no checkpoint yet, so the run starts over")
        run.start_over(folder)
        return None
    checkpoints.keep_until(folder / "checkpoints", checkpoints.step_of(checkpoint))
    for name, length in state(checkpoint)["lengths"].items():
        metrics.cut(folder / name, length)
    judged.forget_after(folder, checkpoints.step_of(checkpoint))
    progress.note(f"going on after step {checkpoints.step_of(checkpoint)}")
    return checkpoint


def _leave(work: Work, folder: Path) -> None:
    """What was trained, in the run's folder, with what belongs to it: there whole or not at all."""
    if isinstance(work.model, PeftModel):
        work.progress.stage("saving the adapter")
        checkpoints.publish(folder / trained.ADAPTER, lambda unfinished: _save_adapter(work, unfinished))
    else:
        work.progress.stage("saving the model")
        try:
            checkpoints.publish(folder / trained.WHOLE, lambda unfinished: _save_model(work, unfinished))
        except ExportError as error:
            raise RunError(f"{error}\nThen: `{interrupt.command(folder)}`.") from None


def _save_adapter(work: Work, folder: Path) -> None:
    adapters.save(work.model, folder)
    _save_companions(work, folder)
    base = folder_of(work.recipe)
    trained_with.write(folder, None if base is None else weights_mark(base))


def _save_model(work: Work, folder: Path) -> None:
    total = whole_files.weight_bytes(work.model)
    whole_files.write_model(work.model, folder, in_mib(work.progress, total))
    _save_companions(work, folder)
    trained_with.write(folder)


def _save_companions(work: Work, folder: Path) -> None:
    """What a server needs to stop where the training data did: tokenizer, template, stop tokens."""
    template = work.recipe.chat_template
    if template != AUTO:
        work.tokenizer.chat_template = None if template == NONE else Path(template).read_text(encoding="utf-8")
    work.tokenizer.save_pretrained(str(folder))
    settings = unwrapped(work.model).generation_config.to_dict() | {"eos_token_id": list(work.data.stop_ids)}
    settings.pop("_from_model_config", None)  # or a loader would take the model's own stop tokens over these
    GenerationConfig.from_dict(settings).save_pretrained(str(folder))
