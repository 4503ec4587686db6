"""safetensors: the folder that `lite merge` writes, for transformers, vLLM and SGLang."""

from pathlib import Path
from typing import Any

from lite.export.order import Order
from lite.merge.checkpoint import Checkpoint
from lite.merge.folder import write as write_folder
from lite.merge.source import Source, source_of
from lite.train.progress import Progress


def names(source: Source, order: Order) -> list[str]:
    """The folder's name where none was given."""
    return [f"{source.name}-merged"]


def write(source: Source, staging: Path, names: list[str], order: Order, progress: Progress) -> dict[str, Any]:
    """Fill the folder `staging`; what export_report.json says of it, by its name."""
    progress.stage(f"writing {names[0]}")
    return {names[0]: {**write_folder(source, staging, progress), "onto": source.onto}}


def check(source: Source, staging: Path, names: list[str], order: Order, progress: Progress) -> dict[str, Any]:
    """Whether every tensor that was written is there, of its shape, with the files that belong to it."""
    written = Checkpoint.open(staging)
    expected = source.weights.shapes
    problems = [
        f"{name}: {written.shapes.get(name, 'not')} in the folder, {expected.get(name, 'not')} in the model"
        for name in sorted({*expected, *written.shapes})
        if written.shapes.get(name) != expected.get(name)
    ]
    source_of(staging)  # raises where tokenizer, template or stop tokens are not those that were trained with
    checked = (
        f"{len(written.shapes)} tensors are there in their shapes, tokenizer, template and stop tokens as trained with"
    )
    return {names[0]: {"problems": problems, "checked": checked}}
