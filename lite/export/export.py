"""The story of an export: a source is opened, its target written aside, proved, and only then given its name.

Whatever stops it on the way, an interrupt or a full disk too, nothing lies under the final name but what was proved.
"""

import importlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import lite
from lite import spellings
from lite.errors import ExportError, raise_collected
from lite.export.order import TARGETS, Order
from lite.merge.onto import settled
from lite.merge.source import Source
from lite.train import checkpoints, failures, run
from lite.train.progress import Progress, Quiet

REPORT = "export_report.json"
RUN_EXPORTS = "export"  # folder in a run's own, where no output is named

Figures = dict[str, Any]


class Exported(NamedTuple):
    """What an export left: its files, or its one folder, and by their names what export_report.json says of each."""

    order: Order
    source: Source
    paths: list[Path]
    report: Path
    reports: dict[str, Figures]


def export(order: Order, progress: Progress | None = None) -> Exported:
    """Carry out an order. Raises a LiteError for what the user can mend; then nothing was left."""
    progress = progress or Quiet()
    with failures.told(progress):
        target = target_of(order.target)
        source = settled(order.source, base=order.base, onto=order.onto, progress=progress)
        finals = _finals(target, order, source)
        _require_free(finals, order)
        with _aside(finals[0]) as staging:
            names = [path.name for path in finals]
            reports = target.write(source, staging, names, order, progress)
            if order.check:
                progress.stage("checking what was written")
                for name, found in target.check(source, staging, names, order, progress).items():
                    reports[name] |= found
                _require_sound(reports)
            return _published(order, source, staging, finals, reports)


def target_of(name: str) -> ModuleType:
    """The module of a target. Raises ExportError, with the nearest, if there is none of the name."""
    if name not in TARGETS:
        near = spellings.nearest(name, TARGETS)
        hint = f" Did you mean {near}?" if near else ""
        raise ExportError(f"--to {name}: no such target.{hint} Expected one of {', '.join(TARGETS)}.")
    return importlib.import_module(f"lite.export.{TARGETS[name][0]}")


def _finals(target: ModuleType, order: Order, source: Source) -> list[Path]:
    """Where everything will lie."""
    names = target.names(source, order)
    if order.output is None:
        folder = Path(order.source) / RUN_EXPORTS if (Path(order.source) / run.RECIPE).is_file() else Path()
        return [folder / name for name in names]
    leaves_folder = TARGETS[order.target][2]
    if leaves_folder or len(names) == 1:
        return [order.output]
    return [order.output / name for name in names]


def _require_free(finals: list[Path], order: Order) -> None:
    """Raise ExportError if something lies where the export would, unless it may be replaced."""
    kind = "folder" if TARGETS[order.target][2] else "file"
    problems = []
    for path in finals:
        if path.is_dir() and kind == "file":
            problems.append(f"{path} is a folder; a file is written here.")
        elif path.exists() and not (order.overwrite or (path.is_dir() and not any(path.iterdir()))):
            problems.append(f"{path} is there already.")
    raise_collected(ExportError, "Nothing was written:", problems, "Name another by -o, or pass --overwrite.")


@contextmanager
def _aside(final: Path) -> Iterator[Path]:
    """A folder beside the final place, gone at the end whatever happens."""
    staging = final.parent / f".{final.name}.unfinished"
    try:
        shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
        staging.mkdir(parents=True)
    except OSError as error:
        raise ExportError(f"{final.parent}: cannot be written to: {error.strerror}. Name another place.") from None
    try:
        yield staging
    except OSError as error:
        raise ExportError(f"{final}: was not written: {error.strerror or error}. Nothing was left there.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _require_sound(reports: Mapping[str, Figures]) -> None:
    problems = [f"{name}: {problem}" for name, found in reports.items() for problem in found.get("problems", [])]
    raise_collected(
        ExportError,
        "What was written is not as the model is, and was deleted:",
        problems,
        "--no-check would keep it. A smaller error: another --type (q8_0, q6_k), or --imatrix data.",
    )


def _published(
    order: Order, source: Source, staging: Path, finals: list[Path], reports: dict[str, Figures]
) -> Exported:
    """Give what was written its names; export_report.json last, in the folder or beside the files."""
    leaves_folder = TARGETS[order.target][2]
    report = (finals[0] if leaves_folder else finals[0].parent) / REPORT
    told = {
        name: {"source": order.source, "target": order.target, "lite": lite.__version__, **found}
        for name, found in reports.items()
    }
    if leaves_folder:
        _write_json(staging / REPORT, told)
        checkpoints.put(staging, finals[0])
    else:
        for path in finals:
            checkpoints.sync(staging / path.name)
            os.replace(staging / path.name, path)
        before = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
        _write_json(report.with_name(f".{report.name}"), before | told)
        os.replace(report.with_name(f".{report.name}"), report)
        checkpoints.sync(report.parent)
    return Exported(order, source, finals, report, told)


def _write_json(path: Path, content: Figures) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
