"""Aside: a folder that is filled under a hidden, unfinished name beside its place, and is renamed when it is whole.

The unfinished name is this process's alone, so that two which write to one place each write a folder of their own. The
one that is done first gets the name; the other is told so.
"""

import contextlib
import glob
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lite.errors import ExportError
from lite.train import checkpoints


@contextmanager
def aside(final: Path) -> Iterator[Path]:
    """A new folder beside `final`, gone at the end whatever happens, unless `publish` has given it the name.

    Those of processes that were killed on this machine are removed first. Raises OSError if it cannot be made.
    """
    stem = f".{final.name}.unfinished-{platform.node()}-"
    for path in final.parent.glob(f"{glob.escape(stem)}*"):
        if _is_dead(path.name.removeprefix(stem).partition("-")[0]):
            shutil.rmtree(path, ignore_errors=True)
    folder = final.with_name(f"{stem}{os.getpid()}-{secrets.token_hex(3)}")
    try:
        folder.mkdir(parents=True)  # here, for a signal may come right after it
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, final: Path) -> None:
    """Give what `aside` made the name `final`, all of it on the disk first; an empty folder there gives way.

    Raises ExportError if something has appeared there meanwhile: it stays.
    """
    checkpoints.sync_all(folder)
    if os.name == "nt":  # where no folder gives way to another by itself
        with contextlib.suppress(OSError):
            final.rmdir()
    try:
        os.rename(folder, final)
    except OSError as error:
        if not final.exists():
            raise
        raise ExportError(
            f"{final}: something has appeared there while this was written, perhaps by another process. It stays, and "
            "what was written is gone. Name another folder."
        ) from error
    checkpoints.sync(final.parent)


def _is_dead(process: str) -> bool:
    """Whether there is no process of that number on this machine; of what is no number that is not known."""
    if os.name == "nt" or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except OSError:  # it is another's
        return False
    return False
