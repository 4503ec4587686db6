"""A run from the command line: other packages silenced, progress on stderr, the result on stdout."""

import atexit
import gc
import importlib
import json
import logging
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lite.cli import options, result
from lite.cli.progress import Shown, shown
from lite.recipe import BUNDLED, Recipe

if TYPE_CHECKING:
    from lite.train import Run

INTERRUPTED = 130
# What training on must share with a run, beside its model and the loss's own settings; an adapter brings its own.
SAME = ("loss", "load_in_4bit", "load_in_8bit", "ref", "ref_adapter", "ref_load_in_4bit", "chat_template", "columns")
OF_FULL = ("train_embeddings", "int8_weights", "dtype")  # an AdamW trains whole weights in fp32 alone
OF_GALORE = tuple(key for key in Recipe.model_fields if key.startswith("galore_"))


def train(recipe: Recipe, *, as_json: bool) -> int:
    """Train by the recipe; return the exit status."""

    def work(progress: Shown) -> "Run":
        from lite.train import train as train_by

        return train_by(recipe, progress=progress)

    return _follow(work, as_json=as_json)


def precompute(recipe: Recipe, *, as_json: bool, train_by: Sequence[str]) -> int:
    """Fill the reference cache; return the exit status. `train_by`: the command that would train on it."""
    silence()
    with shown() as progress:
        progress.stage("loading torch and transformers")
        import_quickly("lite.train")
        from lite.train import precompute as fill

        try:
            done = fill(recipe, progress=progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("What was computed is in the cache; the same command goes on from there.") from None
    if as_json:
        print(json.dumps(done))
        return 0
    print(f"{done['rows']} rows in {done['cache']}: {done['computed']} computed, {done['reused']} found there")
    print(f"next      {shlex.join(train_by)}")
    return 0


def resume(folder: Path, *, max_steps: int | None, as_json: bool) -> int:
    """Go on with the run in `folder`; return the exit status."""

    def work(progress: Shown) -> "Run":
        from lite.train import resume as resume_run

        return resume_run(folder, max_steps=max_steps, progress=progress)

    return _follow(work, as_json=as_json)


def _follow(work: Callable[[Shown], "Run"], *, as_json: bool) -> int:
    silence()
    with shown() as progress:
        progress.stage("loading torch and transformers")
        import_quickly("lite.train")
        from lite.train.interrupt import Interrupted

        try:
            run = work(progress)
        except Interrupted as stopped:
            progress.close()
            print(stopped, file=sys.stderr)
            return INTERRUPTED
    if as_json:
        print(result.as_json(run.result))
    else:
        result.page(run.result, _samples(run), following(run))
    return 0


def following(run: "Run") -> list[str]:
    """Where the adapter or the model is, and what to do with it: each command with what it needs of this run."""
    recipe, folder = run.recipe, shlex.quote(str(run.folder))
    rows = recipe.eval_data or recipe.data
    judged = f"lite score --run {folder}" + ("" if rows == BUNDLED else f" --data {shlex.quote(rows)}")
    if recipe.ref:
        judged += f" --ref {shlex.quote(recipe.ref)}"
    elif recipe.signature.reference:
        judged += " --ref start"
    other = f"    lite what-if {folder}" if run.result["eval_after"] else ""
    same = options.otherwise(recipe, [*((*OF_FULL, *OF_GALORE) if recipe.full else ()), *SAME])
    export = f"lite export {folder} --to gguf --type q4_k_m"
    if recipe.full:
        left = f"model     {run.model}"
        how = ["--galore"] if recipe.optimizer == "galore" else ["--full", "--optimizer", recipe.optimizer]
        on = shlex.join(["--model", str(run.model), *how, *same])
    else:
        left = f"adapter   {run.adapter}"
        export += f"    lite merge {folder} -o MODEL"
        on = f"{shlex.join(['--model', recipe.model, *same])} --run {folder}"
    return [
        left,
        f"judge it  {judged}{other}",
        f"talk      lite chat {folder}",
        f"export    {export}",
        f"train on  lite {shlex.quote(recipe.method)} {on} --data MORE.jsonl",
    ]


def _samples(run: "Run") -> list[dict[str, str]]:
    """Those of the folder, for the ones of before may have been taken by a process that was interrupted."""
    path = run.folder / "samples.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


@contextmanager
def terminable() -> Iterator[None]:
    """While this is open SIGTERM ends the work as Ctrl-C does, so that it can remove what is unfinished.

    Outside the main thread nothing is installed, for Python forbids it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        # None is a handler that was not installed from Python; only its own installer can bring it back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def import_quickly(room: str) -> None:
    """Import a room with all that it needs of other packages, in two thirds of the time.

    Python's collector would look through hundreds of thousands of new objects again and again, none of them garbage.
    """
    gc.disable()
    try:
        importlib.import_module("lite.model.bnb")
        importlib.import_module(room)
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # or packages that count their objects at the end complain of a leak
        gc.enable()


def silence() -> None:
    """Keep other packages' chatter off stderr, unless the user asked for it by the package's own switch.

    Downloads keep their bars on a terminal: they take minutes, and nothing else tells how long.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # It warns, on every CPU, that a kernel for inference is not installed; there is nothing to be done about it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # It tells of every try to reach the hub; lite tells once, and what to do.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
