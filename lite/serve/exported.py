"""The q8_0 file that stands for a run or a model when it is served: made once, and found again by what it is made of.

A digest of the weights, the adapter and the tokenizer is in its name, so that whatever changes is exported anew; an
older one of the same source is then deleted.
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
FOLDER = "serve"
READ_WHOLE_BYTES = 64 * 2**20  # larger files are known by name, size and time


def exported(name: str, *, base: str | None = None, check: bool = True, progress: Progress) -> tuple[Path, str]:
    """The file, made now if it is not there, and the name that it is served by.

    check: compare a new file with the model before it gets its name. Raises a LiteError for what the user can mend; a
    file that is not as the model is, is deleted.
    """
    source = source_of(name, base=base)
    folder = folder_of(source)
    final = folder / f"{source.name}-{TYPE.name}-{digest(source)}.gguf"
    if final.is_file():
        progress.note(f"{final} is as the model is now, and is served")
        return final, source.name
    progress.stage(f"exporting {source.name} to {TYPE.name}, once")
    export(Order(name, types=TYPE.name, output=final, base=base, check=check), progress)
    for older in folder.glob(f"*-{TYPE.name}-{'[0-9a-f]' * 16}.gguf"):
        if older != final:
            older.unlink(missing_ok=True)
    return final, source.name


def folder_of(source: Source) -> Path:
    """Where what is served of a source is kept: in its run's folder if that can be written to, else in the cache.

    There it is a folder of this source alone, for many models' folders have the same name.
    """
    assert source.folder is not None
    if (source.folder / run.RECIPE).is_file() and os.access(source.folder, os.W_OK):
        return source.folder / FOLDER
    # A model of the hub has another folder at every revision.
    on_the_hub = source.base_name if source.recipe is None and source.adapter is None else None
    place = xxhash.xxh3_64((on_the_hub or str(source.folder.resolve())).encode(errors="surrogateescape"))
    return default_folder() / FOLDER / f"{source.name}-{place.hexdigest()[:8]}"


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


def _files(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield from sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
