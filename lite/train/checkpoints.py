"""Checkpoints: folders that are either whole or not there.

One is written under a temporary name beside its place, every file synced, a manifest of sizes and digests last, then
renamed, and the parent synced. Whatever moment a process dies at, the name `checkpoint-N` stands for a whole
checkpoint or for nothing; what a disk or a copy breaks later, the manifest shows when it is read.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from lite.errors import RunError
from lite.train import interrupt

MANIFEST = "manifest.json"
UNFINISHED = ".unfinished-"
_NAME = re.compile(r"checkpoint-(\d+)")


def write(parent: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """The folder `parent/checkpoint-STEP`, as `fill` wrote it, on the disk before this returns.

    Raises RunError if it cannot be written; nothing that was there before is touched then.
    """
    final = parent / f"checkpoint-{step}"
    try:
        publish(final, lambda folder: (fill(folder), _write_manifest(folder)))
    except (OSError, RuntimeError, SafetensorError) as error:
        # A full disk is the first of these to Python, the second to torch.save, the third to safetensors.
        raise RunError(
            f"{final}: the checkpoint could not be written: {error}.\n"
            f"Earlier checkpoints are whole. Make room, then `{interrupt.command(parent.parent)}`."
        ) from error
    return final


def publish(final: Path, fill: Callable[[Path], object]) -> None:
    """Make the folder `final` appear at once and whole, in the place of one that may be there; or leave nothing new."""
    unfinished = final.with_name(f"{UNFINISHED}{final.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        fill(unfinished)
        sync_all(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)  # it may be what has filled the disk
        raise
    if final.exists():
        # A folder cannot be renamed onto another. Whoever publishes it again can do so once more after a kill here.
        shutil.rmtree(final)
    os.replace(unfinished, final)
    sync(final.parent)


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def sync_all(folder: Path) -> None:
    """Have the system write a folder with all that is in it to the disk."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder, and writes names through by itself
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest(parent: Path, note: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, or None. Broken ones are passed over, with a word to `note`."""
    for folder in reversed(listed(parent)):
        broken = problems(folder)
        if not broken:
            return folder
        note(f"{folder}: skipped, for it is broken: {'; '.join(broken)}")
    return None


def listed(parent: Path) -> list[Path]:
    """Every folder named like a checkpoint, by step."""
    found = [path for path in parent.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(_NAME.fullmatch(folder.name).group(1))


def problems(folder: Path) -> list[str]:
    """What of a checkpoint is missing or is not as it was written; empty if it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return [f"no readable {MANIFEST}"]
    found = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            found.append(f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}")
        elif _digest(path) != expected["blake2b"]:
            found.append(f"{name} has other content than was written")
    return found


def prune(parent: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a killed process left unfinished."""
    for folder in parent.glob(f"{UNFINISHED}*"):
        shutil.rmtree(folder)
    for folder in listed(parent)[:-keep]:
        _remove(folder)


def keep_until(parent: Path, step: int) -> None:
    """Delete every checkpoint after `step`: broken ones that were passed over, or those of a run that starts over."""
    for folder in listed(parent):
        if step_of(folder) > step:
            _remove(folder)


def _remove(folder: Path) -> None:
    # Renamed first: a kill inside the deletion must not leave half a checkpoint under a checkpoint's name.
    doomed = folder.with_name(f"{UNFINISHED}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _write_manifest(folder: Path) -> None:
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "blake2b": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
