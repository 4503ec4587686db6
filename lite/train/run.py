"""Run: the folder that training leaves, and what a resume compares before it goes on.

runs/NAME/
  recipe.yaml       every setting; written last of the first four, so that a folder with it is a run
  identity.json     what the run was started from: recipe, digest of the data, model; a resume refuses another
  environment.json  versions, commit, device      ledger.json     rows kept, cut and dropped, by reason
  metrics.jsonl     losses and rewards            speed.jsonl     times and memory
  logps/            what the policy said of the held-out rows at each evaluation: for `lite what-if`
  checkpoints/      the newest, each whole        samples.json    answers before and after
  adapter/          the result, with tokenizer    result.json     the numbers at the end; only a finished run has it
  model/            instead of adapter/, where the weights themselves were trained: a whole model
  reference/        what the policy was when it last became the reference, if --refresh-reference lets it
  start_adapter/    a copy of the adapter that the run went on from, if it did
  rows_skipped.txt  rows that could not be used, if --skip-bad-rows let it go on without them
"""

import itertools
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lite import recipe as recipes
from lite import signatures
from lite.errors import RunError, raise_collected
from lite.model import trained
from lite.recipe import Recipe
from lite.train import checkpoints, judged, metrics
from lite.train.interrupt import command

RUNS = Path("runs")
LOCK = ".lock"
RECIPE = "recipe.yaml"
IDENTITY = "identity.json"
ENVIRONMENT = "environment.json"
LEDGER = "ledger.json"
PLAN = "plan.json"
RESULT = "result.json"
SKIPPED = "rows_skipped.txt"
START_ADAPTER = "start_adapter"


@dataclass(frozen=True)
class Run:
    """A finished run. `result`: run, steps, seconds, peak_bytes, packing, eval_before, eval_after; of full also model.

    It has left an adapter or, with `full`, a model; to ask for the other is a RunError that says so.
    """

    folder: Path
    recipe: Recipe
    result: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The trained adapter, with the tokenizer that belongs to it."""
        if self.recipe.full:
            raise RunError(
                f"{self.folder}: whole weights were trained, and there is no adapter. Its model: {self.model}."
            )
        return self.folder / trained.ADAPTER

    @property
    def model(self) -> Path:
        """The model whose weights were trained, with the tokenizer that belongs to it."""
        if not self.recipe.full:
            told = f"{self.folder}: the run trained an adapter, {self.adapter}. "
            raise RunError(f"{told}To have a model of it: lite merge {shlex.quote(str(self.folder))} -o MODEL.")
        return self.folder / trained.WHOLE

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return metrics.read(self.folder / metrics.METRICS)


def require_free(recipe: Recipe) -> None:
    """Raise RunError if a run of the recipe cannot have its folder: to be asked before any work."""
    folder = Path(recipe.output_dir or RUNS)
    above = checkpoints.existing(folder)
    if not os.access(above, os.W_OK):
        raise _unwritable(folder, f"{above} cannot be written to")
    if recipe.output_dir is None:
        return
    if folder.exists() and not folder.is_dir():
        raise RunError(f"output_dir = {folder}: a file is there. Expected a folder, or nothing.")
    if (folder / RECIPE).exists():
        raise RunError(
            f"output_dir = {folder}: holds a run already. Go on with it by `{command(folder)}`, or name another folder."
        )


def new_folder(recipe: Recipe, *, kind: str = "") -> Path:
    """Make the folder of a run: the recipe's `output_dir`, else runs/METHOD-MODEL-TIME, which nobody else has taken.

    kind: before the method, where it is no run.
    """
    if recipe.output_dir is not None:
        return _made(Path(recipe.output_dir), exist_ok=True)
    method, model = recipe.method.rpartition(":")[2], Path(recipe.model).name
    first = RUNS / re.sub(r"[^\w.-]+", "-", f"{kind}{method}-{model}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = first
    for number in itertools.count(2):
        try:
            return _made(folder, exist_ok=False)
        except FileExistsError:  # runs of a sweep may start within one second; whoever makes the folder has it
            folder = first.with_name(f"{first.name}-{number}")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the run's lock, which the system takes back from a process that dies; RunError if another holds it."""
    if os.name == "nt":
        yield  # no flock there
        return
    import fcntl

    try:
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written to: {error.strerror}. Check its permissions.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{folder}: another process is training there. Wait for it, or stop it.") from None
        yield


@contextmanager
def going_on(folder: Path) -> Iterator[None]:
    """While the run is under way: whatever the system or a signal ends it with also says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if not (folder / RECIPE).exists():
            raise
        raise KeyboardInterrupt(f"To go on from the last checkpoint: {command(folder)}") from None
    except (OSError, SafetensorError) as error:
        begun = (folder / RECIPE).exists()
        then = f"`{command(folder)}`: its checkpoints are whole" if begun else "start again: no step was taken"
        raise RunError(
            f"{folder}: the run stopped: {error}.\nMend that (make room, if a disk is full) and {then}."
        ) from error


def create(
    folder: Path,
    recipe: Recipe,
    identity: Mapping[str, Any],
    notes: Mapping[str, Any],
    *,
    skipped: Sequence[str] = (),
) -> None:
    """Make the folder a run; `notes` are its other JSON files by name, `skipped` the rows that could not be used."""
    (folder / "checkpoints").mkdir(exist_ok=True)
    for name, content in {**notes, IDENTITY: identity}.items():
        write_json(folder / name, content)
    if skipped:
        (folder / SKIPPED).write_text("\n".join(skipped) + "\n", encoding="utf-8")
    save_recipe(folder, recipe)


def save_recipe(folder: Path, recipe: Recipe) -> None:
    """Write recipe.yaml whole or not at all."""
    unfinished = folder / f".{RECIPE}"
    recipe.save(unfinished)
    _put(unfinished, folder / RECIPE)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _put(unfinished, path)


def opened(folder: Path) -> Recipe:
    """The recipe of a run. Raises RunError if the folder is none."""
    if not (folder / RECIPE).is_file():
        raise RunError(f"{folder}: no run is there. Expected the folder of a run, with its {RECIPE}.")
    return recipes.load(folder / RECIPE)


def result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, None of any other."""
    path = folder / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def require_same(folder: Path, identity: Mapping[str, Any], *, but: str = "") -> None:
    """Raise RunError naming everything in `identity` that is not as when the run started, beside the setting `but`."""
    before = _identity(folder)
    now = json.loads(json.dumps(identity))
    completed = _completed(before["recipe"], now.get("recipe"))
    changed = [f"{what} in {RECIPE}" for what in _changes(completed, now.get("recipe"), but)]
    if before["data"] != now.get("data", before["data"]):
        source = now["recipe"]["data"]
        changed.append(f"data: the rows of {source} (or its held-out rows) are not those that it began with")
    if before.get("loss") != now.get("loss", before.get("loss")):
        changed.append(f"method: the file of {now['recipe'].get('loss') or now['recipe']['method']} is not as it was")
    but_model = "" if "weights" in before["model"] else "weights"  # a run of an earlier lite has no mark of them
    changed += [f"model: {what}" for what in _changes(before["model"], now.get("model"), but_model)]
    advice = "Put it back as it was; `--max-steps` alone may be raised, by name. Or start a new run with --recipe."
    raise_collected(RunError, f"{folder} cannot go on, for this has changed since it started:", changed, advice)


def planned_steps(folder: Path) -> int:
    """Steps that the run was started or extended to have."""
    return _identity(folder)["steps"]


def data_digest(folder: Path) -> str:
    """Of the rows that the run was started with: `Prepared.digest`."""
    return _identity(folder)["data"]


def note_environment(folder: Path, now: Mapping[str, Any], note: Callable[[str], None]) -> None:
    """Say what differs from the machine that the run began on: from here on its last bits may differ too."""
    before = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    changed = [f"{key} {before.get(key)} → {now[key]}" for key in now if before.get(key) != now[key]]
    if changed:
        note(f"another environment than the run began in: {', '.join(changed)}")


def extend(folder: Path, recipe: Recipe, identity: Mapping[str, Any]) -> None:
    """Let a run have more steps from now on, whatever happens next."""
    # The result goes first: a kill between these leaves an unfinished run, which a resume brings to its end again.
    (folder / RESULT).unlink(missing_ok=True)
    write_json(folder / IDENTITY, identity)
    save_recipe(folder, recipe)


def start_over(folder: Path) -> None:
    """Forget what a run wrote before its first checkpoint."""
    checkpoints.keep_until(folder / "checkpoints", 0)
    shutil.rmtree(folder / judged.FOLDER, ignore_errors=True)
    for name in (metrics.METRICS, metrics.SPEED, "samples.json", RESULT):
        (folder / name).unlink(missing_ok=True)


def keep_start_adapter(folder: Path, adapter: Path) -> None:
    """Copy the adapter that the run goes on from: resume needs it, whatever becomes of the original."""
    checkpoints.publish(
        folder / START_ADAPTER, lambda unfinished: shutil.copytree(adapter, unfinished, dirs_exist_ok=True)
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any] | None, but: str = "") -> list[str]:
    keys = dict.fromkeys([*before, *now]) if now is not None else ()
    return [
        f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in keys
        if before.get(key) != now.get(key) and key != but
    ]


def _completed(before: Mapping[str, Any], now: Mapping[str, Any] | None) -> dict[str, Any]:
    """The recipe of a run of an earlier lite, which had not all of today's settings: those at their defaults."""
    if now is None:
        return dict(before)
    of_loss = signatures.find(now["method"], now.get("loss")).hyperparameters
    defaults = {key: known[key].default for known in (Recipe.model_fields, of_loss) for key in known if key in now}
    return {**defaults, **before}


def _identity(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder / IDENTITY}: cannot be read: {error}. Without it nothing can be compared.") from None


def _made(folder: Path, *, exist_ok: bool) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError:
        raise
    except OSError as error:
        raise _unwritable(folder, str(error.strerror)) from None
    return folder


def _unwritable(folder: Path, why: str) -> RunError:
    return RunError(f"{folder}: no run can be written there: {why}. Choose another --output-dir.")


def _put(unfinished: Path, final: Path) -> None:
    checkpoints.sync(unfinished)
    os.replace(unfinished, final)
    checkpoints.sync(final.parent)
