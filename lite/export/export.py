"""The story of an export: a source is opened, its target written aside, proved, and only then given its name.

Whatever stops it on the way, an interrupt or a full disk too, nothing lies under the final name but what was proved.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import lite
from lite.errors import ExportError, raise_collected
from lite.export import place
from lite.export.order import TARGETS, Order, require_target
from lite.merge.aside import aside
from lite.merge.onto import AUTO, settled
from lite.merge.source import ORIGINAL, Source
from lite.train import failures
from lite.train.progress import Progress, Quiet

# The model is read a few rows at a time where it is written, but run to be compared with what was.
ROOM = (
    "Close what else uses the GPU, hide it (CUDA_VISIBLE_DEVICES=) to compare on the CPU, or pass --no-check; where "
    "two bases are measured, --onto original."
)


class Exported(NamedTuple):
    """What an export left: its files, or its one folder, and by their names what export_report.json says of each."""

    order: Order
    source: Source
    paths: list[Path]
    report: Path
    reports: dict[str, dict[str, Any]]


def export(order: Order, progress: Progress | None = None) -> Exported:
    """Carry out an order. Raises a LiteError for what the user can mend; then nothing was left.

    What can be refused is refused before anything is measured or written: that may take an hour.
    """
    progress = progress or Quiet()
    with failures.told(progress, ROOM):
        target = target_of(order.target)
        source = settled(order.source, base=order.base, onto=ORIGINAL if order.onto == AUTO else order.onto)
        paths = place.finals(order, target.names(source, order))
        place.require_free(paths, order, source)
        if hasattr(target, "require"):
            target.require(source, order)
        if order.onto == AUTO:
            source = settled(order.source, base=order.base, onto=AUTO, progress=progress)
        names = [path.name for path in paths]
        with _aside(paths[0]) as staging:
            reports = target.write(source, staging, names, order, progress)
            if order.check:
                progress.stage("checking what was written")
                for name, found in target.check(source, staging, names, order, progress).items():
                    reports[name] |= found
                _require_sound(reports)
            known = {"source": order.source, "target": order.target, "lite": lite.__version__}
            reports = {name: {**known, **found} for name, found in reports.items()}
            report = place.put(staging, paths, order, reports)
    return Exported(order, source, paths, report, reports)


def target_of(name: str) -> ModuleType:
    """The module of a target. Raises ExportError, with the nearest, if there is none of the name."""
    require_target(name)
    return importlib.import_module(f"lite.export.{TARGETS[name][0]}")


@contextmanager
def _aside(final: Path) -> Iterator[Path]:
    """A folder beside the final place, gone at the end whatever happens."""
    begun = False
    try:
        with aside(final) as staging:
            begun = True
            yield staging
    except OSError as error:
        if not begun:
            raise ExportError(f"{final.parent}: cannot be written to: {error.strerror}. Name another place.") from None
        raise ExportError(f"{final}: was not written: {error.strerror or error}. Nothing was left there.") from error


def _require_sound(reports: Mapping[str, Mapping[str, Any]]) -> None:
    problems = [f"{name}: {problem}" for name, found in reports.items() for problem in found.get("problems", [])]
    headline = "What was written is not as the model is, and was deleted:"
    raise_collected(ExportError, headline, problems, "--no-check would keep it.")
