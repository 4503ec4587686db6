"""The story of `lite merge`: a source is found and merged into a model's folder, which appears whole or not at all."""

import os
import shlex
from pathlib import Path
from typing import Any

from lite.errors import ExportError
from lite.merge.aside import aside, publish
from lite.merge.folder import write
from lite.merge.onto import AUTO, settled
from lite.model import trained_with
from lite.train import failures
from lite.train.progress import Progress, Quiet

# Merging reads a few rows at a time; measuring loads a whole model.
ROOM = "Close what else uses memory, or leave out the measuring of two bases: --onto original."


def merge(
    name: str | Path,
    to: Path,
    *,
    base: str | Path | None = None,
    onto: str = AUTO,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model that a run, an adapter or a model's name stands for into the folder `to`; what was written.

    A few rows are in memory at a time. Raises a LiteError for what the user can mend: all that `source_of` raises, a
    folder that is taken, or is by the end; a full disk. Nothing is left under the name `to` then.
    """
    progress = progress or Quiet()
    with failures.told(progress, ROOM):
        to = to.expanduser()
        require_free(to)
        source = settled(name, base=base, onto=onto, progress=progress)
        command = ["lite", "merge", source.name, "-o", to.name, *(["--onto", source.onto] if source.compared else [])]
        progress.stage(f"merging into {to}")
        final = to.resolve()
        try:
            with aside(final) as folder:
                written = write(source, folder, progress, command=shlex.join(command))
                publish(folder, final)
        except OSError as error:
            raise ExportError(
                f"{to}: the model could not be written: {error}. Make room, or name another folder."
            ) from error
    return {
        "folder": str(to),
        "source": str(name),
        "base": None if source.base is None else str(source.base),
        "onto": source.onto,
        "compared": list(source.compared),
        **written,
        "trained_with": trained_with.record_of(to)._asdict(),
    }


def require_free(to: Path) -> None:
    """Raise ExportError if `to` cannot become the merged model's folder: to be asked before any work."""
    if to.exists() and not to.is_dir():
        raise ExportError(f"{to}: a file is there. Expected a folder, or nothing.")
    if to.is_dir() and any(to.iterdir()):
        raise ExportError(f"{to}: something is in it already. Name another folder, or empty this one.")
    above = next(path for path in to.absolute().parents if path.exists())
    if not os.access(above, os.W_OK):
        raise ExportError(f"{to}: {above} cannot be written to. Name a folder elsewhere.")
