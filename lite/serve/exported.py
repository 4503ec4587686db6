"""The q8_0 file that stands for a run or a model when it is served: made once, and found again by what it is made of.

Of a run it lies in the run's folder, of anything else in the user's cache. A digest of the weights, the adapter and the
tokenizer is in its name, so that whatever changes is exported anew; an older one of the same name is then deleted.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import xxhash

import lite
from lite.export.export import export
from lite.export.order import Order
from lite.gguf.types import FILE_TYPES
from lite.merge.source import Source, source_of
from lite.reference.database import default_folder
from lite.train import run
from lite.train.progress import Progress

TYPE = FILE_TYPES["q8_0"]
FOLDER = "serve"  # in the run's, or in the user's cache
READ_WHOLE_BYTES = 64 * 2**20  # larger files are known by name, size and time


def exported(name: str, *, base: str | None = None, check: bool = True, progress: Progress) -> tuple[Path, str]:
    """The file, made now if it is not there, and the name that it is served by.

    check: compare a new file with the model before it gets its name. Raises a LiteError for what the user can mend; a
    file that is not as the model is, is deleted.
    """
    source = source_of(name, base=base)
    folder = _folder(source)
    final = folder / f"{source.name}-{TYPE.name}-{digest(source)}.gguf"
    if final.is_file():
        progress.note(f"{final} is as the model is now, and is served")
        return final, source.name
    progress.stage(f"exporting {source.name} to {TYPE.name}, once")
    export(Order(name, types=TYPE.name, output=final, base=base, check=check), progress)
    for older in folder.glob(f"{source.name}-{TYPE.name}-*.gguf"):
        if older != final and len(older.stem) == len(final.stem):
            older.unlink(missing_ok=True)
    return final, source.name


def digest(source: Source) -> str:
    """16 hex digits of all that decides the file: what is in the folders, and lite's version."""
    content = xxhash.xxh3_64(f"{lite.__version__} {TYPE.name}".encode())
    for folder in dict.fromkeys((source.base, source.adapter, source.files)):
        for path in _files(folder):
            stat = path.stat()
            content.update(f"{path.name} {stat.st_size}".encode())
            if stat.st_size <= READ_WHOLE_BYTES:
                content.update(path.read_bytes())
            else:
                content.update(f"{path.resolve()} {stat.st_mtime_ns}".encode())
    return content.hexdigest()


def _folder(source: Source) -> Path:
    of_a_run = source.folder is not None and (source.folder / run.RECIPE).is_file()
    if of_a_run and os.access(source.folder, os.W_OK):
        return source.folder / FOLDER
    return default_folder() / FOLDER


def _files(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield from sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
