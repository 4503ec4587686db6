"""Plots into files: a line chart of named series, and the timeline of a step's memory with the time of its parts.

A file's ending says what it is: .png; .svg; .html, one page with the drawing in it that needs no other file. matplotlib
is an extra and imported here alone; its figures are used without pyplot, so that nothing global changes.
"""

import html
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite.errors import ReportError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".html")
# Told apart by colour-blind readers: those of Okabe and Ito 2008, then some of Paul Tol's muted ones.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
COLOURS += ("#882255", "#44AA99", "#332288", "#DDCC77", "#117733", "#CCBBDD")
GREY = "#666666"
GIB, MIB = 2**30, 2**20
NARROWEST = 0.03  # of the plot's width: a phase or a bar below it has no room for its name
STYLE = "body{font:16px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em}svg{width:100%}"


def curves(
    file: Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    title: str = "",
    limit: tuple[float, str] | None = None,
    log2_x: bool = False,
) -> Path:
    """Draw named lines, each through its points (xs, ys), into `file`, which is returned.

    `x` and `y` name the axes with their units; `limit`: a horizontal line at a height, with its label; `log2_x`: an x
    axis whose ticks are powers of two. Raises ReportError if the file's ending is unknown or matplotlib is missing.
    """
    figure = _figure(file, width=8.0, height=4.8)
    axes = figure.subplots()
    for i, (name, (xs, ys)) in enumerate(series.items()):
        axes.plot(xs, ys, label=name, color=COLOURS[i % len(COLOURS)], marker="o", markersize=4)
    if limit:
        axes.axhline(limit[0], color=GREY, linestyle="--", linewidth=1)
        axes.annotate(limit[1], (1, limit[0]), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=GREY)
    if log2_x:
        _powers_of_two(axes, [value for xs, _ in series.values() for value in xs])
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    if len(series) > 1:
        axes.legend(frameon=False)
    return _save(figure, file, title)


def timeline(
    file: Path,
    parts: Mapping[str, Sequence[float]],
    phases: Sequence[tuple[int, str]],
    seconds: Mapping[str, float],
    *,
    title: str,
) -> Path:
    """Draw a step into `file`, which is returned: its live bytes by part over its operators, and its time by part.

    parts: of each part the bytes at each point, stacked in their order; phases: the first point of each and its name,
    in order; seconds: of each part of the step. Raises ReportError as `curves` does.
    """
    figure = _figure(file, width=11.0, height=6.4)
    memory, time = figure.subplots(2, 1, height_ratios=(6, 1))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys([*parts, *seconds]))}
    _stack(memory, parts, phases, colours)
    memory.set_title(title, loc="left", pad=20)
    _bar(time, seconds, colours)
    return _save(figure, file, title)


def require(what: str = "plots") -> None:
    """Raise ReportError where matplotlib is missing: to be asked before hours of work that end in a plot."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ReportError(f'{what}: matplotlib is needed for that and is not here. pip install "lite[plot]"')


def _stack(
    axes: "Axes",
    parts: Mapping[str, Sequence[float]],
    phases: Sequence[tuple[int, str]],
    colours: Mapping[str, str],
) -> None:
    points = max(map(len, parts.values()), default=0)
    top = max((sum(heights) for heights in zip(*parts.values(), strict=True)), default=0)
    size, unit = (GIB, "GiB") if top >= GIB else (MIB, "MiB")
    stacked = [[value / size for value in values] for values in parts.values()]
    if stacked:
        own = [colours[name] for name in parts]
        axes.stackplot(range(points), stacked, labels=list(parts), colors=own, linewidth=0)
    ends = [*(start for start, _ in phases), points][1:]
    for i, ((start, name), end) in enumerate(zip(phases, ends, strict=True)):
        if i:
            axes.axvline(start, color=GREY, linewidth=0.5)
        if end - start >= NARROWEST * points:
            where = ((start + end) / 2, 1.01)
            axes.annotate(name, where, xycoords=("data", "axes fraction"), ha="center", va="bottom", color=GREY)
    axes.set(xlabel="operators of the step, in order", ylabel=f"live memory ({unit})", xlim=(0, max(points - 1, 1)))
    handles, names = axes.get_legend_handles_labels()
    # From the top down, as the areas lie.
    axes.legend(handles[::-1], names[::-1], frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _bar(axes: "Axes", seconds: Mapping[str, float], colours: Mapping[str, str]) -> None:
    total, left = sum(seconds.values()), 0.0
    for name, value in seconds.items():
        axes.barh(0, value, left=left, color=colours[name], label=f"{name} {value:.3g} s")
        if value >= 2 * NARROWEST * total:
            axes.text(left + value / 2, 0, name, ha="center", va="center", fontsize="small")
        left += value
    axes.set(xlabel="time of a step (s)", yticks=[], xlim=(0, total or 1))
    if seconds:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.6), fontsize="small")


def _powers_of_two(axes: "Axes", values: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    exponents = sorted({round(value).bit_length() - 1 for value in values if value >= 1})
    ticks = [2**e for e in range(exponents[0], exponents[-1] + 2)] if exponents else []
    ticks = [tick for tick in ticks if tick <= max(values)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)


def _figure(file: Path, *, width: float, height: float) -> "Figure":
    """An empty figure of so many inches. Raises ReportError where none can be had, or could not be saved."""
    if file.suffix not in KINDS:
        raise ReportError(f"{file}: a plot cannot be saved so. Expected a name that ends in {', '.join(KINDS)}.")
    require(str(file))
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", file: Path, title: str) -> Path:
    if file.suffix == ".png":
        figure.savefig(file, format="png", dpi=150)
    elif file.suffix == ".svg":
        file.write_text(_svg(figure), encoding="utf-8")
    else:
        drawing = _svg(figure)
        drawing = drawing[drawing.index("<svg") :]  # a page has a head of its own
        name = html.escape(title or file.stem)
        head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
        page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{drawing}\n</body></html>\n'
        file.write_text(page, encoding="utf-8")
    return file


def _svg(figure: "Figure") -> str:
    """The drawing as text: words stay words, and the same figure gives the same bytes."""
    import matplotlib

    settings: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "lite"}
    written = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()
