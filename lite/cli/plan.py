"""`lite plan METHOD`: whether a run fits, at which settings, what takes the memory; with the method's own options."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite import signatures
from lite.cli import options
from lite.cli.options import Setting
from lite.errors import RecipeError
from lite.recipe import BUNDLED, Recipe

if TYPE_CHECKING:
    from lite.plan import Plan
    from lite.plan.longest import Reach

TEXT = """Plan: does a run fit, at which settings, what takes the memory, how long may the longest pair be, how fast.

Nothing is downloaded but, for a model that is neither a folder nor an alias, its config; nothing needs a GPU. The real
step runs on tensors without memory. With --data the plan is for its rows; without, for pairs as long as --max-length
allows. What the recipe leaves open is chosen; `lite METHOD` with the same options trains so."""
OWN = (
    Setting(
        "card", str, ("--card",), "NAME", "The card to plan for: rtx-4090, l4, a100-80gb …; its memory and speed.",
        ("default: this machine's, else a usual one of --vram",), "Plan",
    ),
    Setting("quick", bool, ("--quick",), "", "By a few layers; the whole model is not run.", ("default: off",), "Plan"),
    Setting("max", bool, ("--max",), "", "The longest pair that fits, lever by lever.", ("default: off",), "Plan"),
    Setting(
        "sweep", str, ("--sweep",), "KEY=A..B", "A plan for each value: doubling from A to B, or KEY=A,B,C.", (), "Plan"
    ),
    Setting("plot", str, ("--plot",), "FILE", "Draw what --sweep finds: .png, .svg or .html.", (), "Plan"),
)  # fmt: skip
# Settings that change which rows there are, how long, or how many in a step.
OF_ROWS = ("max_length", "batch_size", "max_steps")


def main(arguments: Sequence[str]) -> int:
    """Plan as the arguments say, or show their help; return the exit status: 0 though it does not fit."""
    from lite.cli import training

    own = (*OWN, *options.OWN)
    method = training.method_of(
        "plan", arguments, TEXT, able=list(signatures.registered()),
        settings=lambda name: [*own, *options.settings(signatures.find(name))],
    )  # fmt: skip
    if method is None:
        return 0
    recipe, asked = training.parsed(method, arguments[1:], own, program=f"lite plan {method}")
    _check(asked)
    values = _values(recipe, asked["sweep"]) if asked.get("sweep") else None
    # Before anything is loaded, so that a value out of its range is told at once.
    changed = {number: Recipe(**{**recipe.resolved(), values[0]: number}) for number in values[1]} if values else {}
    from lite.cli import session
    from lite.cli.progress import shown as progress_shown

    session.silence()
    with progress_shown() as progress:
        progress.stage("loading torch and transformers")
        session.import_quickly("lite.plan")
        from lite import plan as planning
        from lite.model import trained
        from lite.plan.target import target

        recipe = trained.settle(recipe)  # of an adapter that it goes on from, the rank

        where = target(recipe, card=asked.get("card"))
        rows = _lengths(recipe, progress) if _has_data(recipe) else None
        if asked.get("max"):
            found = list(planning.reaches(recipe, where))
            return _reaches(found, where, as_json=asked.get("json", False))
        if values is not None:
            key, numbers = values
            plans = []
            for number in numbers:
                progress.stage(f"{options.flag(key)} {number:,}")
                if rows is not None and key in OF_ROWS:
                    rows = _lengths(changed[number], progress)
                made = planning.plan(changed[number], rows=rows, where=where, quick=True, advise=False)
                plans.append((number, made))
            return _sweep(key, plans, asked)
        made = planning.plan(recipe, rows=rows, where=where, quick=asked.get("quick", False), said=progress.stage)
    if asked.get("json"):
        print(json.dumps(made.to_dict()))
    else:
        from lite.cli import plan_page

        plan_page.show(made, _following(made, method, arguments))
    return 0


def _check(asked: dict[str, Any]) -> None:
    if asked.get("sweep") and asked.get("max"):
        raise RecipeError("--sweep beside --max: take one of them.")
    if plot := asked.get("plot"):
        if Path(plot).suffix not in (".png", ".svg", ".html"):
            raise RecipeError(f"--plot {plot}: expected a name that ends in .png, .svg or .html.")
        if not Path(plot).absolute().parent.is_dir():
            raise RecipeError(f"--plot {plot}: there is no folder {Path(plot).parent}.")
    if asked.get("plot") and not asked.get("sweep"):
        raise RecipeError("--plot draws what --sweep finds. Give --sweep max-length=1024..65536, or leave it out.")


def _has_data(recipe: Recipe) -> bool:
    """Whether the rows to plan for are there: the bundled ones are of the bundled model alone."""
    return recipe.data != BUNDLED or recipe.model == BUNDLED


def _lengths(recipe: Recipe, progress: Any) -> Any:
    """The lengths of the recipe's rows, read and tokenised as a run would."""
    from lite.data.prepare import prepare
    from lite.model import load
    from lite.plan.lengths import of_examples
    from lite.train.work import planned_steps

    progress.stage("reading the data")
    data = prepare(recipe, load.load_tokenizer(recipe))
    for line in data.ledger.lines():
        progress.note(line)
    return of_examples(data.train, recipe, planned_steps(recipe, data))


def _values(recipe: Recipe, text: str) -> tuple[str, list[int]]:
    """The setting to sweep and its values. Raises RecipeError for what is no whole number of the recipe."""
    name, _, given = text.partition("=")
    key = name.strip().removeprefix("--").replace("-", "_")
    field = Recipe.model_fields.get(key)
    whole = [k for k, f in Recipe.model_fields.items() if f.annotation in (int, int | None)]
    if field is None or key not in whole:
        raise RecipeError(
            f"--sweep {text}: {name!r} is no whole number of a recipe. Expected one of {', '.join(whole)}."
        )
    first, dots, last = given.partition("..")
    try:
        if dots:
            low, high = int(first), int(last)
            numbers = [low * 2**i for i in range(64) if 0 < low * 2**i <= high]
        else:
            numbers = [int(part) for part in given.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise RecipeError(f"--sweep {text}: expected {name}=1024..65536, or {name}=1024,3000,8192.")
    return key, numbers


def _sweep(key: str, plans: list[tuple[int, "Plan"]], asked: dict[str, Any]) -> int:
    from lite.cli import plan_page

    if asked.get("json"):
        print(json.dumps([{key: number, **made.to_dict()} for number, made in plans]))
    else:
        plan_page.table(key, plans)
    if asked.get("plot"):
        from lite.report.plots import curves
        from lite.sizes import GIB

        numbers = [number for number, _ in plans]
        budget = plans[0][1].target.budget_bytes / GIB
        lines = {"peak on the card": (numbers, [made.peak_bytes / GIB for _, made in plans])}
        if any(made.levers_on_host for _, made in plans):
            lines["in host memory"] = (numbers, [made.host_bytes / GIB for _, made in plans])
        label = f"usable: {budget:.1f} GiB"
        file = curves(
            Path(asked["plot"]), lines, x=options.flag(key), y="memory (GiB)", limit=(budget, label), log2_x=True
        )
        print(f"plot      {file}", file=sys.stderr if asked.get("json") else sys.stdout)
    return 0


def _reaches(found: list["Reach"], where: Any, *, as_json: bool) -> int:
    if as_json:
        keys = ("words", "tokens", "peak_bytes", "host_bytes", "tokens_per_second")
        longest = max((one.tokens for one in found), default=0)
        print(json.dumps({"longest_pair_tokens": longest, "levers": [{k: getattr(r, k) for k in keys} for r in found]}))
        return 0
    from lite.cli import plan_page

    plan_page.reaches(found, where)
    return 0


def _following(made: "Plan", method: str, arguments: Sequence[str]) -> Iterator[str]:
    """What to type next."""
    ours = {setting.flags[0] for setting in (*OWN, options.JSON)}
    ours |= {flag.replace("--", "--no-", 1) for flag in ours}
    kept, skip = [], False
    for argument in arguments[1:]:
        name = argument.split("=")[0]
        if skip or name in ours:
            skip = not skip and name in ("--card", "--sweep", "--plot") and "=" not in argument
            continue
        kept.append(argument)
    if made.fits:
        yield f"train     {shlex.join(['lite', method, *kept])}"
    else:
        yield f"it would fit with {'; or with '.join(made.advice)}"
    yield f"longest   {shlex.join(['lite', 'plan', *arguments, '--max'])}"
