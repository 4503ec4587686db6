"""What came of the runs of bench/optimizers.py: the log that they are appended to, its table, its plot."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from measuring import Found, read_lines
from optimizer_rows import Row

KEPT = ("final", "start", "seconds", "cpu_seconds", "update_seconds", "others", "curve")  # of each run, beside its seed
HEADS = {"runs": 7, "mean": 7, "spread": 7, "run, s": 7, "update": 7, "states": 9, "gradients": 9, "weights": 9}
BYTES = ("state_bytes", "gradient_bytes", "weight_bytes", "peak_bytes")


class Log:
    """A JSONL file of finished runs and measurements, of which those of one bench's settings count."""

    def __init__(self, path: Path, settings: Found) -> None:
        self.path, self.settings = path, settings
        if path.exists() and not path.read_text(encoding="utf-8").endswith("\n"):
            # The line that a killed bench was writing.
            whole = path.read_text(encoding="utf-8").rpartition("\n")
            path.write_text(whole[0] + whole[1], encoding="utf-8")
        self.records = [one for one in read_lines(path) if one["settings"] == settings] if path.exists() else []

    def has(self, name: str, row: Row, seed: int) -> bool:
        """Whether a run is finished, of a row that is still the same."""
        return any(one["seed"] == seed for one in self.runs(name, row))

    def runs(self, name: str, row: Row) -> list[Found]:
        """Finished runs of a row, by seed."""
        told = trained_by(row)
        own = [one for one in self.records if one["kind"] == "run" and one["name"] == name and one["row"] == told]
        return sorted(own, key=lambda one: one["seed"])

    def add(self, name: str, row: Row, seed: int, found: Found) -> None:
        """A run is finished."""
        self.note("run", seed, {"name": name, "row": trained_by(row), **found})

    def note(self, kind: str, seed: int, found: Found) -> None:
        """Append anything that was measured."""
        record = {"kind": kind, "seed": seed, **found, "settings": self.settings}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(json.loads(json.dumps(record)))

    def measured(self, kind: str, seed: int) -> bool:
        """Whether there is any measurement of a kind with a seed."""
        return any(one["kind"] == kind and one["seed"] == seed for one in self.records)

    def of(self, kind: str) -> list[Found]:
        """Measurements of a kind, without the settings."""
        own = [one for one in self.records if one["kind"] == kind]
        return [{key: value for key, value in one.items() if key not in ("settings", "kind")} for one in own]


def trained_by(row: Row) -> Found:
    """A row as figures, without what does not change a run."""
    return {key: value for key, value in asdict(row).items() if key != "decides"}


def summary(log: Log, rows: dict[str, Row]) -> Found:
    """Every row that has runs: its seeds, mean and spread, and how it stands beside the rows it is to be compared with.

    `over_fp32` is the mean of its final losses' ratio to those of the same row in fp32 throughout; `minus_galore_torch`
    the mean of the difference to galore-torch's at the same rank, interval and rate, seed by seed, and its standard
    error. `best` has, of every way of one rank and interval, the rate with the lowest mean.
    """
    runs = {name: found for name, row in rows.items() if (found := log.runs(name, row))}
    told: dict[str, Found] = {}
    for name, own in runs.items():
        finals = [one["final"] for one in own]
        told[name] = {
            **trained_by(rows[name]), "mean": fmean(finals), "spread": stdev(finals) if len(finals) > 1 else None,
            **{key: fmean(one[key] for one in own) for key in ("seconds", "cpu_seconds", "update_seconds")},
            **{key: max(one[key] for one in own) for key in BYTES if key in own[0]},
            "runs": [{"seed": one["seed"], **{key: one[key] for key in KEPT}} for one in own],
        }  # fmt: skip
        if (twin := _plain_twin(name, rows)) in runs:
            ratios = [mine / theirs for mine, theirs in _paired(own, runs[twin])]
            told[name]["over_fp32"] = fmean(ratios) if ratios else None
        if (rival := _rival(name, rows)) in runs:
            told[name]["minus_galore_torch"] = _difference([a - b for a, b in _paired(own, runs[rival])])
    return {"rows": told, "best": _best(told), "refresh": log.of("refresh"), "energy": log.of("energy")}


def lines(result: Found) -> Iterator[str]:
    """The table."""
    yield " " * 28 + "".join(f" {head:>{width}s}" for head, width in HEADS.items())
    for name, one in result["rows"].items():
        spread = f"{one['spread']:7.4f}" if one["spread"] is not None else " " * 7
        sizes = " ".join(f"{one[key]:9,d}" for key in BYTES[:3])
        beside = f"  {one['over_fp32']:.4f} of fp32" if one.get("over_fp32") else ""
        if rival := one.get("minus_galore_torch"):
            error = f" ± {rival['error']:.4f}" if rival["error"] is not None else ""
            beside += f"  {rival['mean']:+.4f}{error} to galore-torch"
        timed = f"{one['seconds']:7.1f} {one['update_seconds']:7.1f}"
        yield f"{name:28s} {len(one['runs']):7d} {one['mean']:7.4f} {spread} {timed} {sizes}{beside}"
    for one in result["refresh"]:
        ratios = ", ".join(f"{way} {one[f'{way}_over_sketch']:.1f}" for way in ("svd", "eigh"))
        yield f"refresh of {one['size']}, rank {one['rank']}, over the sketch's time: {ratios}"
    for one in result["energy"]:
        own = ", ".join(f"{way} {value:.3f}" for way, value in one["next"].items())
        yield f"later energy, seed {one['seed']}, step {one['step']}, of {one['steps_summed']}: {own}"


def draw(result: Found, file: Path) -> None:
    """Final losses of every row, a dot for each seed and a bar at their mean; from scratch and fine-tuned apart."""
    from matplotlib.figure import Figure

    parts = [
        [n for n, one in result["rows"].items() if one["fine"] == fine and n != "frozen"] for fine in (False, True)
    ]
    parts = [names for names in parts if names]
    if not parts:
        return
    figure = Figure(figsize=(9, 1.6 + 0.2 * sum(map(len, parts))), layout="constrained")
    panels = figure.subplots(len(parts), 1, squeeze=False, height_ratios=[len(names) + 2 for names in parts])[:, 0]
    for axes, names in zip(panels, parts, strict=True):
        for height, name in enumerate(names):
            one = result["rows"][name]
            finals = [run["final"] for run in one["runs"]]
            colour = {"adamw": "tab:gray", "galore-torch": "tab:orange"}.get(one["optimizer"], "tab:blue")
            axes.plot(finals, [height] * len(finals), "o", color=colour, markersize=4, alpha=0.7)
            axes.plot([one["mean"]], [height], "|", color=colour, markersize=12)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.25)
        fine = result["rows"][names[0]]["fine"]
        steps = result["settings"]["fine_steps" if fine else "steps"]
        axes.set_xlabel(
            f"validation loss after {steps} steps, nats a token: {'fine-tuned' if fine else 'from scratch'}"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def _plain_twin(name: str, rows: dict[str, Row]) -> str | None:
    plain = replace(rows[name], states="float32", weights="float32", merge="step")
    return _named(plain, rows) if rows[name] != plain else None


def _rival(name: str, rows: dict[str, Row]) -> str | None:
    row = rows[name]
    rival = Row("galore-torch", row.rate, rank=row.rank, interval=row.interval, fine=row.fine)
    return _named(rival, rows) if row.optimizer == "galore" else None


def _named(wanted: Row, rows: dict[str, Row]) -> str | None:
    return next((name for name, row in rows.items() if trained_by(row) == trained_by(wanted)), None)


def _paired(one: Sequence[Found], other: Sequence[Found]) -> list[tuple[float, float]]:
    finals = {run["seed"]: run["final"] for run in other}
    return [(run["final"], finals[run["seed"]]) for run in one if run["seed"] in finals]


def _difference(values: Sequence[float]) -> Found | None:
    if not values:
        return None
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": fmean(values), "error": error, "seeds": len(values)}


def _best(told: dict[str, Found]) -> dict[str, Any]:
    best: dict[str, Any] = {}
    for name, one in told.items():
        way = one["projection"] if one["optimizer"] == "galore" else one["optimizer"]
        plain = one["weights"] == one["states"] == "float32" and not one["adaptive"] and one["sketch_steps"] == 1
        plain = plain and not one["as_galore_torch"]
        group = f"{'fine ' if one['fine'] else ''}{way}, rank {one['rank']:.3g} d, T = {one['interval']}"
        if plain and (group not in best or one["mean"] < best[group]["mean"]):
            best[group] = {"row": name, **{key: one[key] for key in ("rate", "mean", "spread")}, "n": len(one["runs"])}
    return best
