"""`lite score`: what a model says of every row of a file, a line of JSON each, or a page of the rows it doubts most."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lite import recipe as recipes
from lite import signatures
from lite.cli import options
from lite.cli.console import console
from lite.cli.options import JSON, Setting
from lite.cli.progress import duration
from lite.errors import RecipeError, raise_collected

if TYPE_CHECKING:
    from lite.data.examples import Example
    from lite.judge.score import Scores
    from lite.judge.tally import ScoredRow

METHOD = "dpo"  # whose settings are a reference's and beta; no loss is computed
KEYS = {
    "beta", "adapter", "run", "ref", "ref_adapter", "ref_load_in_4bit", "cache", "data", "format", "columns",
    "chat_template", "max_length", "skip_bad_rows", "allow_dropped", "tokens_per_pack", "chunk_tokens", "self_check",
}  # fmt: skip
# What these settings mean where nothing is trained.
OTHERWISE = {
    "beta": "By it, log ratios to the reference become rewards; without it the run's.",
    "device": "Where to compute; auto takes a GPU if there is one.",
    "adapter": "Folder of an adapter to put on the model.",
    "run": "Finished run to judge: its model, template and beta, unless they are given.",
    "ref": "A model to compare with: a folder, hub name or alias; `start`: the model before the adapter or the run.",
    "self_check": "Compare the fast path with the plain model first.",
}
TEXT = """Score: the log-probability of every completion of a file, for judging a model or a run and for choosing data.

Pairs get chosen and rejected scored, other rows their completion. With --json a line for each row, in the file's order,
skipped ones too, and a last line with the summary; without, the summary and the rows that the model doubts most: pairs
whose labels may be flipped."""
SHOWN_CHARACTERS = 60


def main(arguments: Sequence[str]) -> int:
    """Score as the arguments say, or show their help; return the exit status."""
    known = settings()
    if {"-h", "--help"} & set(arguments):
        from lite.cli import help

        help.verb("lite score", TEXT, known)
        return 0
    from lite.cli.parse import parse

    given = parse(arguments, known, program="lite score")
    as_json = given.pop("json", False)
    recipe = _recipe(given, known)
    from lite.cli import session
    from lite.cli.progress import shown

    session.silence()
    out = sys.stdout  # a bar on the terminal would take what is printed while it is there
    with shown() as progress:
        progress.stage("loading torch and transformers")
        session.import_quickly("lite.judge")
        from lite.judge import score

        scores = score(recipe, progress)
        for row in scores:
            if as_json:
                print(json.dumps(row.to_dict()), file=out, flush=True)
    if as_json:
        print(json.dumps({"summary": scores.summary}), flush=True)
    else:
        page(scores, arguments)
    return 0


def settings() -> list[Setting]:
    """The recipe's own, as far as they matter here."""
    own = [s for s in options.settings(signatures.find(METHOD)) if s.panel == "Model" or s.key in KEYS]
    own = [replace(s, help=OTHERWISE.get(s.key, s.help)) for s in own]
    return [*(replace(s, panel="Reference", facts=()) if s.key == "beta" else s for s in own), JSON]


def _recipe(given: Mapping[str, Any], known: Sequence[Setting]) -> recipes.Recipe:
    """The recipe of what was typed. Raises RecipeError naming each flag that cannot be used."""
    values = {**given, "method": METHOD}
    flags = {setting.key: setting.flags[0] for setting in known}
    found = [flags.get(problem.key, problem.key) + problem.text for problem in recipes.problems(values)]
    raise_collected(RecipeError, recipes.HEADLINE, found)
    return recipes.Recipe(**values)


FIGURES = (
    ("preference_accuracy", "chosen is likelier", "{:.1%}"),
    ("preference_accuracy_per_token", "chosen is likelier, per token", "{:.1%}"),
    ("mean_margin", "margin: log p of chosen − rejected", "{:.3f}"),
    ("perplexity_chosen", "perplexity of chosen", "{:.3f}"),
    ("perplexity_rejected", "perplexity of rejected", "{:.3f}"),
    ("perplexity_completion", "perplexity", "{:.3f}"),
    ("perplexity_desirable", "perplexity of desirable rows", "{:.3f}"),
    ("perplexity_undesirable", "perplexity of undesirable rows", "{:.3f}"),
    ("rewards/accuracies", "chosen has more reward", "{:.1%}"),
    ("rewards/margins", "margin of rewards", "{:.4f}"),
    ("rewards/chosen", "reward of chosen", "{:.4f}"),
    ("rewards/rejected", "reward of rejected", "{:.4f}"),
    ("rewards/completion", "reward", "{:.4f}"),
    ("rewards/desirable", "reward of desirable rows", "{:.4f}"),
    ("rewards/undesirable", "reward of undesirable rows", "{:.4f}"),
)


def page(scores: "Scores", arguments: Sequence[str]) -> None:
    """Print the summary for people, the rows that are doubted most, and what to type next."""
    shown, summary, recipe = console(), scores.summary, scores.subject.recipe
    skipped = f", {summary['skipped']} skipped" if summary["skipped"] else ""
    speed = f"{summary['tokens_per_second'] or 0:,.0f} tokens/s"
    took = f"{summary['seconds']:.1f} s" if summary["seconds"] < 10 else duration(summary["seconds"])
    name = recipe.model if not (recipe.run or recipe.adapter) else f"{recipe.model} with {recipe.run or recipe.adapter}"
    shown.print(Text(f"\n{name}: {summary['rows']} rows{skipped} in {took}, {speed}\n"), soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for key, words, form in FIGURES:
        if key in summary:
            table.add_row(words, "–" if summary[key] is None else form.format(summary[key]))
    shown.print(table, "")
    if scores.tally.worst:
        shown.print(Text(_doubt(scores)), soft_wrap=True)
        shown.print(_doubted(scores.tally.worst), "")
    for line in following(scores, arguments):
        shown.print(Text(line), soft_wrap=True)


def _doubt(scores: "Scores") -> str:
    """What makes a row doubtful, as a line above them."""
    measure = "rewards" if scores.subject.reference else "log p per token"
    if "mean_margin" in scores.summary:
        swapped = "; where it is negative, chosen and rejected may be swapped"
        doubted = any((row.conviction or 0) < 0 for row in scores.tally.worst)
        return f"rows that it doubts most, by the margin of {measure}{swapped if doubted else ''}"
    return f"rows that it doubts most, by {measure}"


def _doubted(rows: Sequence["ScoredRow"]) -> Table:
    """The rows, with their place, that measure, the tokens of the completions, and the prompt's end."""
    cells = [
        (
            f"{Path(row.place.file).name}:{row.place.row}",
            f"{row.conviction:.3f}",
            " ".join(str(said.tokens) for said in row.completions.values()),
            _asked(row.example),
        )
        for row in rows
    ]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, side, column in zip(
        ("row", "", "tokens"), ("left", "right", "right"), zip(*cells, strict=True), strict=False
    ):
        # The prompt gives way where the terminal is narrow, and never these.
        table.add_column(name, justify=side, no_wrap=True, min_width=max(map(len, (name, *column))))
    table.add_column("prompt", overflow="ellipsis", no_wrap=True)
    for line in cells:
        table.add_row(*map(Text, line))
    return table


def _asked(example: "Example | None") -> str:
    """The end of the prompt, in a line."""
    prompt = example.prompt if example else ""
    text = " ".join((prompt if isinstance(prompt, str) else prompt[-1]["content"]).split())
    text = "".join(character if character.isprintable() else "�" for character in text)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS].rstrip()} …"


def following(scores: "Scores", arguments: Sequence[str]) -> list[str]:
    """What to type next."""
    subject, again = scores.subject, shlex.join(["lite", "score", *arguments])
    lines = [f"each row         {again} --json > scores.jsonl"]
    if (subject.run or subject.recipe.adapter) and subject.reference is None:
        lines.append(f"beside its start  {again} --ref start")
    if subject.run:
        lines.append(f"other losses     {shlex.join(['lite', 'what-if', subject.run])}")
    return lines
