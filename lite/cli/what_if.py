"""`lite what-if RUN`: what other losses and betas would make of the run's held-out rows, as tables or as JSON."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lite import signatures
from lite.cli import options
from lite.cli.console import console
from lite.cli.options import JSON, Setting
from lite.cli.resume import RUN
from lite.errors import RecipeError

if TYPE_CHECKING:
    from lite.judge.what_if import Outcome, WhatIf

PANEL = "Command"
BETA = Setting(
    "beta", str, ("--beta",), "NUMBER,…", "Betas to try.", ("default: five from 0.01 to 1, and the run's own",), PANEL
)
LOSS = Setting("loss", str, ("--loss",), "NAME,…", "Losses to try.", ("default: all that fit the run's rows",), PANEL)
STEP = Setting("step", int, ("--step",), "INTEGER", "The evaluation to look at.", ("default: the last",), PANEL)
STEPS = Setting(
    "steps", bool, ("--steps",), "", "The run's own loss at each of its evaluations instead.", ("default: off",), PANEL
)
TEXT = """What other losses and betas would make of a run's held-out rows, in seconds, without a model.

The run keeps the log-probs of its held-out rows at each evaluation; losses with a reference take the run's own, or
what the reference cache knows of these rows. A row is saturated if it pulls on the model at most 5 % as hard as at
margin 0, where policy and reference agree (without a reference: where a pair's completions are alike). The gradient
weight is the mean pull against that at margin 0: 1 is all of it, near 0 there is nothing left to learn. A pull is
|∂loss / ∂log p|, the mean over a row's completions; the likelihood in orpo, cpo and rpo pulls at any margin."""


def main(arguments: Sequence[str]) -> int:
    """Print the table that the arguments ask for, or their help; return the exit status."""
    cache = [s for s in options.settings(signatures.find("dpo")) if s.key == "cache"]
    settings = [BETA, LOSS, STEP, STEPS, *cache, JSON]
    if {"-h", "--help"} & set(arguments):
        from lite.cli import help

        help.verb("lite what-if RUN", TEXT, [RUN, *settings])
        return 0
    from lite.cli.parse import parse

    given = parse(arguments, settings, program="lite what-if", positional="run")
    found = _found(given)
    if given.get("json"):
        print(as_json(found))
    else:
        page(found)
    return 0


def _found(given: dict[str, Any]) -> "WhatIf":
    """What was asked for. Raises RecipeError for values that cannot be used."""
    betas, step = _numbers(given.get("beta")), given.get("step")
    losses = given["loss"].split(",") if "loss" in given else None
    if isinstance(step, str):
        raise RecipeError(f"--step = {step!r}: expected a whole number, a step at which the run evaluated.")
    if given.get("steps") and (losses is not None or step is not None):
        raise RecipeError("--steps beside --loss or --step: it shows the run's own loss at every step. Take one.")
    from lite.cli import session

    session.silence()
    from lite.judge.what_if import course, what_if

    folder, cache = Path(given["run"]), given.get("cache")
    if given.get("steps"):
        return course(folder, betas=betas, cache=cache, note=_note)
    return what_if(folder, betas=betas, losses=losses, step=step, cache=cache, note=_note)


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise RecipeError(f"--beta = {text!r}: expected numbers above 0, such as 0.05,0.1,0.3.") from None


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def as_json(found: "WhatIf") -> str:
    """One object: run, rows, reference, left_out, and the outcomes, with null for what a loss does not have."""
    outcomes = [
        {
            "step": one.step,
            "method": one.method,
            "settings": one.settings,
            "beta": one.beta,
            "own": one.own,
            "loss": one.loss,
            "saturated": one.saturated,
            "gradient": one.gradient,
            "gradient_weight": one.gradient_weight,
            "rewards/accuracies": one.accuracy,
            "rewards/margins": one.margin,
        }
        for one in found.outcomes
    ]
    finite = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in one.items()} for one in outcomes
    ]
    return json.dumps({**found._asdict(), "outcomes": finite})


def page(found: "WhatIf") -> None:
    """Print the tables for people: a course over steps, or losses against betas."""
    shown = console()
    steps = dict.fromkeys(one.step for one in found.outcomes)
    when = f"step {next(iter(steps))}" if len(steps) == 1 else f"steps {min(steps)} to {max(steps)}"
    shown.print(Text(f"\n{found.run}, {when}: {found.rows} held-out rows; {_reference(found)}\n"), soft_wrap=True)
    if len(steps) > 1:
        shown.print(_course(found.outcomes))
    else:
        shown.print(_rewards(found.outcomes), "")
        for title, figure in FIGURES.items():
            shown.print(Text(title, style="bold"))
            shown.print(_by_beta(found.outcomes, figure), "")
    if any(one.own for one in found.outcomes):
        shown.print(Text("* the run's own loss and beta"))
    for name, why in found.left_out.items():
        shown.print(Text(f"{name} is not among them: {why}"), soft_wrap=True)


def _reference(found: "WhatIf") -> str:
    if found.reference is None:
        return "no reference: losses without one only"
    return "reference as in the run" if found.reference == "run" else "reference from the cache"


def _rewards(outcomes: Sequence["Outcome"]) -> Table:
    """What does not depend on beta, or only by its factor: how often chosen has more reward, and by how much."""
    table = Table("rewards", box=None, padding=(0, 2, 0, 0))
    table.add_column("accuracy", justify="right")
    table.add_column("margin / beta", justify="right")
    first: dict[str, Outcome] = {}
    for one in outcomes:
        first.setdefault(one.name, one)
    for name, one in first.items():
        margin = one.margin / one.beta if one.beta else one.margin
        table.add_row(Text(name), _shown(one.accuracy, "{:.1%}"), _shown(margin, "{:.3f}"))
    return table


def _by_beta(outcomes: Sequence["Outcome"], figure: Callable[["Outcome"], str]) -> Table:
    """Losses down, betas across; a loss without a beta has its one figure in the first column."""
    betas = sorted({one.beta for one in outcomes if one.beta is not None})
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("beta")
    for beta in betas:
        table.add_column(f"{beta:g}", justify="right")
    rows: dict[tuple[str, str], dict[float | None, Text]] = {}
    for one in outcomes:
        cell = Text(f"{figure(one)} *" if one.own else f"{figure(one)}  ", style="bold" if one.own else "")
        rows.setdefault((one.name, str(one.settings)), {})[one.beta] = cell
    for (name, _), cells in rows.items():
        first = cells.pop(None, None)
        table.add_row(Text(name), *([first] if first else [cells.get(beta, Text("")) for beta in betas]))
    return table


def _course(outcomes: Sequence["Outcome"]) -> Table:
    """A line for each step, and for each beta of it."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("step", "beta", "loss", "saturated", "gradient weight", "accuracy", "margin"):
        table.add_column(name, justify="right")
    for one in outcomes:
        beta = "" if one.beta is None else f"{one.beta:g}" + (" *" if one.own else "  ")
        figures = (
            _shown(one.loss, "{:.4f}"),
            _shown(one.saturated, "{:.0%}"),
            _shown(one.gradient_weight, "{:.3f}"),
            _shown(one.accuracy, "{:.1%}"),
            _shown(one.margin, "{:.4f}"),
        )
        table.add_row(str(one.step), beta, *figures)
    return table


def _shown(value: float, form: str) -> str:
    return "–" if math.isnan(value) else form.format(value)


FIGURES: dict[str, Callable[["Outcome"], str]] = {
    "loss": lambda one: _shown(one.loss, "{:.4f}"),
    "saturated rows": lambda one: _shown(one.saturated, "{:.0%}"),
    "gradient weight": lambda one: _shown(one.gradient_weight, "{:.3f}"),
}
