"""Kills runs and resumes them, each in a fork of one warm process; run by test_crashes.py as

    python crashes.py FOLDER SETTINGS.json

Prints a JSON object: for each way to die, what became of it. One thread, and no work in the parent before a fork, so
that a fork is as good as a process of its own.
"""

import contextlib
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lite
from lite.optim.moments import Adam
from lite.optim.projected import Projected
from lite.train import Interrupted, resume

TIMED = int(os.environ.get("LITE_RANDOM_DEATHS", "3"))  # beside those in certain moments
SAVING = ".unfinished-checkpoint-6"  # the checkpoint that the untimed deaths are in
INTERRUPTED = 7


def main(folder: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    began = time.perf_counter()
    reference = folder / "reference"
    assert ended(fork(lambda: (train(settings, reference), tell_modules(folder)))) == 0
    after_set_up_s = time.perf_counter() - began - set_up_seconds(reference)
    for module in json.loads((folder / "modules.json").read_text(encoding="utf-8")):
        with contextlib.suppress(ImportError):  # some are made on the fly, by no file
            importlib.import_module(module)  # once here, instead of once in every fork
    if settings.get("galore"):
        return {
            name: attempt(folder / name.replace(" ", "-"), settings, reference, arm=arm)
            for name, arm in DEATHS_OF_WHOLE_WEIGHTS.items()
        }
    draw = random.Random(0)
    outcomes = {}
    for number in range(TIMED):
        # Drawn from the whole time in which the run has a folder: between the first line and the result.
        # The first at once, before there is any checkpoint.
        delay_s = draw.uniform(number, number + 1) / TIMED * after_set_up_s if number else 0.0
        name = f"after {number + 1} of {TIMED} random delays"
        outcomes[name] = attempt(folder / f"timed-{number}", settings, reference, kill_after_s=delay_s)
    for name, arm in DEATHS.items():
        outcomes[name] = attempt(folder / name.replace(" ", "-"), settings, reference, arm=arm)
    for name, number in {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}.items():
        outcomes[name] = attempt(folder / name, settings, reference, ask=number)
    return outcomes


def attempt(
    folder: Path,
    settings: dict[str, Any],
    reference: Path,
    *,
    kill_after_s: float | None = None,
    arm: Callable[[], None] | None = None,
    ask: int | None = None,
) -> dict[str, Any]:
    """Start a run, end it in the given way, resume it, and compare with the one that was left alone."""
    child = fork(lambda: (arm and arm(), train(settings, folder)))
    if kill_after_s is not None:
        wait_for(folder / "recipe.yaml")
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    if ask is not None:
        wait_for(folder / "speed.jsonl")
        os.kill(child, ask)
    first = ended(child)
    found = {
        "ended": first,
        "had": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "finished": (folder / "result.json").exists(),
        "resumed": ended(fork(lambda: resume(folder))),
    }
    weights = "model/model.safetensors" if settings.get("galore") else "adapter/adapter_model.safetensors"
    files = (weights, "metrics.jsonl", "samples.json")
    found["different"] = [name for name in files if not same(folder / name, reference / name)]
    found["left"] = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return found


def train(settings: dict[str, Any], folder: Path) -> None:
    lite.train(lite.Recipe(**settings, output_dir=str(folder)))


def tell_modules(folder: Path) -> None:
    found = [name for name in sys.modules if name.split(".")[0] in ("torch", "transformers", "peft", "accelerate")]
    (folder / "modules.json").write_text(json.dumps(found), encoding="utf-8")


def fork(work: Callable[[], object]) -> int:
    """The process that does the work; it exits with 0, or 7 if it was interrupted in an orderly way."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except Interrupted:
        status = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.001)


def same(path: Path, other: Path) -> bool:
    return path.exists() and path.read_bytes() == other.read_bytes()


def set_up_seconds(reference: Path) -> float:
    """Time before the folder was there, from what the reference run measured of itself."""
    result = json.loads((reference / "result.json").read_text(encoding="utf-8"))
    written = [(reference / name).stat().st_mtime for name in ("recipe.yaml", "result.json")]
    return max(0.0, result["seconds"] - (written[1] - written[0]))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_half_a_file() -> None:
    """Half of optimizer.pt is on the disk."""
    save = torch.save

    def half(content: object, path: str, *others: Any) -> None:
        save(content, path, *others)
        if f"{SAVING}/optimizer.pt" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    torch.save = half


def between_syncs() -> None:
    """Some files of the checkpoint are synced, others not."""
    sync, seen = os.fsync, []

    def third(descriptor: int) -> None:
        seen.append(SAVING in os.readlink(f"/proc/self/fd/{descriptor}"))
        if sum(seen) == 3:
            die()
        sync(descriptor)

    os.fsync = third


def before_the_rename() -> None:
    """All is written and synced, under the temporary name."""
    replace = os.replace

    def dying(old: Path, new: Path) -> None:
        if Path(old).name == SAVING:
            die()
        replace(old, new)

    os.replace = dying


def after_the_rename() -> None:
    """The name is there; the parent folder was not synced and older checkpoints were not pruned."""
    replace = os.replace

    def dying(old: Path, new: Path) -> None:
        replace(old, new)
        if Path(old).name == SAVING:
            die()

    os.replace = dying


def in_half_an_update() -> None:
    """Step 8: some matrices have their update of it, others not; the newest checkpoint is of step 6."""
    step, seen = Projected.step, []

    def dying(one: Projected, adam: Adam, steps: int, *given: Any) -> None:
        seen.append(steps)
        if seen.count(8) == 3:
            die()
        step(one, adam, steps, *given)

    Projected.step = dying


def in_half_a_model() -> None:
    """The result's weights are written, and nothing else of it."""
    write = Path.write_text

    def dying(path: Path, *given: Any, **named: Any) -> int:
        if path.name == "config.json" and ".unfinished-model" in str(path):
            die()
        return write(path, *given, **named)

    Path.write_text = dying


def in_the_pruning() -> None:
    """The oldest checkpoint is on its way out."""
    replace = os.replace

    def dying(old: Path, new: Path) -> None:
        replace(old, new)
        if Path(old).name == "checkpoint-3":
            die()

    os.replace = dying


DEATHS = {
    "in half a file": in_half_a_file,
    "between syncs": between_syncs,
    "before the rename": before_the_rename,
    "after the rename": after_the_rename,
    "in the pruning": in_the_pruning,
}
# What an adapter's run has not; all that both have is tried with an adapter, whose steps are shorter.
DEATHS_OF_WHOLE_WEIGHTS = {"in half an update": in_half_an_update, "in half a model": in_half_a_model}

if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))))
