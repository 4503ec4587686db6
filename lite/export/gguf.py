"""gguf: a file of each type that was asked for, written in one reading of the model, proved in llama.cpp."""

from pathlib import Path
from typing import Any

from lite.export import importance
from lite.export.order import FROM_DATA, Order
from lite.export.prompts import rows_of
from lite.export.proof import prove
from lite.gguf import llama
from lite.gguf.architectures.table import find
from lite.gguf.types import file_types
from lite.gguf.write import write as write_files
from lite.merge import companions
from lite.merge.source import Source
from lite.train.progress import Progress


def names(source: Source, order: Order) -> list[str]:
    """A file for each type. Raises ExportError for a type that there is not."""
    return [f"{source.name}-{kind.name}.gguf" for kind in file_types(order.types)]


def require(source: Source, order: Order) -> None:
    """Raise what `write` and `check` would stop at, as far as it can be known before: that may be an hour later."""
    find(source.config)
    if order.check:
        llama.require()
    if order.data is not None:
        rows_of(source, companions.load_tokenizer(source.files), order.data)
    importance.require(source, order)


def write(source: Source, staging: Path, names: list[str], order: Order, progress: Progress) -> dict[str, Any]:
    """Write the files into the folder `staging`; what export_report.json says of each."""
    kinds = file_types(order.types)
    outputs = {kind: staging / name for kind, name in zip(kinds, names, strict=True)}
    weighed = importance.of(source, order, progress)
    progress.stage(f"writing {', '.join(names)}")
    named = {} if order.imatrix in (None, FROM_DATA) else {"importance_name": Path(order.imatrix).name}
    done = write_files(source, outputs, importance=weighed, **named, threads=order.threads, progress=progress)
    whole = {key: done[key] for key in ("tensors", "parameters", "seconds", "left_out")}
    reports = {}
    for kind, name in zip(kinds, names, strict=True):
        file = done["files"][kind.name]
        reports[name] = {"type": kind.name, "bytes": file["bytes"], "types": file["types"], **whole}
        reports[name] |= {"onto": source.onto, "imatrix": order.imatrix}
    return reports


def check(source: Source, staging: Path, names: list[str], order: Order, progress: Progress) -> dict[str, Any]:
    """What the proof of each file found."""
    files = {staging / name: kind for kind, name in zip(file_types(order.types), names, strict=True)}
    found = {}
    reports = prove(files, source, data=order.data, threads=order.threads, progress=progress)
    for name, report in zip(names, reports, strict=True):
        told = report.to_dict()
        problems, notes = told.pop("problems"), told.pop("notes")
        found[name] = {"proof": told, "problems": problems, "notes": notes}
    return found
