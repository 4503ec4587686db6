"""Place: where an export will lie, what may be replaced there, and the report beside it or in it."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lite.errors import ExportError, raise_collected
from lite.export.order import TARGETS, Order
from lite.merge.aside import publish
from lite.merge.source import Source
from lite.train import checkpoints, run

REPORT = "export_report.json"
RUN_EXPORTS = "export"  # folder in a run's own, where no output is named
OLD = ".old"

Reports = Mapping[str, Mapping[str, Any]]  # by the name of a file or folder


def finals(order: Order, names: Sequence[str]) -> list[Path]:
    """The files, or the one folder, that an order of these names leaves."""
    if order.output is None:
        folder = Path(order.source) / RUN_EXPORTS if (Path(order.source) / run.RECIPE).is_file() else Path()
        found = [folder / name for name in names]
    elif leaves_folder(order) or len(names) == 1:
        found = [order.output]
    else:
        found = [order.output / name for name in names]
    return [path if path.name not in ("", ".", "..") else path.resolve() for path in found]


def leaves_folder(order: Order) -> bool:
    """Whether the target is a folder rather than files."""
    return TARGETS[order.target][2]


def require_free(paths: Sequence[Path], order: Order, source: Source) -> None:
    """Raise ExportError if something lies there that may not be replaced: a folder that lite did not export, above all.

    Also if the report beside files is none, for the new one takes its entries over.
    """
    problems = []
    for path in paths:
        if leaves_folder(order):
            problems += _folder_problems(path, order, source)
        elif path.is_dir():
            problems.append(f"{path} is a folder; a file is written here.")
        elif path.exists() and not order.overwrite:
            problems.append(f"{path} is there already.")
    if not leaves_folder(order) and _report(paths[0].parent / REPORT) is None:
        problems.append(f"{paths[0].parent / REPORT} is no report of lite's, which would be written there.")
    raise_collected(ExportError, "Nothing was written:", problems, "Name another place by -o, or pass --overwrite.")


def put(staging: Path, paths: Sequence[Path], order: Order, reports: Reports) -> Path:
    """Give what lies in `staging` its names, what was there before giving way last; the path of the report."""
    if leaves_folder(order):
        final = paths[0]
        _write(staging / REPORT, reports)
        old = final.with_name(f".{final.name}{OLD}-{os.getpid()}")
        if order.overwrite and final.exists():
            os.replace(final, old)
        try:
            publish(staging, final)
        except BaseException:
            if old.exists():
                os.replace(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)
        return final / REPORT
    come = [str(path) for path in paths if path.exists() and not order.overwrite]
    raise_collected(ExportError, "Something has appeared meanwhile, and stays:", come, "Name another place by -o.")
    for path in paths:
        checkpoints.sync(staging / path.name)
        os.replace(staging / path.name, path)
    report = paths[0].parent / REPORT
    unfinished = staging / REPORT
    _write(unfinished, {**(_report(report) or {}), **reports})
    os.replace(unfinished, report)
    checkpoints.sync(report.parent)
    return report


def _folder_problems(path: Path, order: Order, source: Source) -> list[str]:
    if path.exists() and not path.is_dir():
        return [f"{path} is a file; a folder is written here."]
    if not path.is_dir() or not any(path.iterdir()):
        return []
    if not order.overwrite:
        return [f"{path} is there already."]
    needed = [Path.cwd(), Path.home(), *(one for one in (source.folder, source.base, source.adapter) if one)]
    if any(one.resolve().is_relative_to(path.resolve()) for one in needed):
        return [f"{path}: what is in it is needed, so that it is not replaced."]
    told = _report(path / REPORT) if (path / REPORT).is_file() else None
    if not told or not any(one.get("target") in TARGETS and TARGETS[one["target"]][2] for one in told.values()):
        return [f"{path} holds what lite did not export, and is not replaced: it has no {REPORT} of its own."]
    return []


def _report(path: Path) -> dict[str, Any] | None:
    """What a report says; {} where there is none, None where the file is something else."""
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) and all(isinstance(one, dict) for one in told.values()) else None


def _write(path: Path, reports: Reports) -> None:
    path.write_text(json.dumps(reports, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    checkpoints.sync(path)
