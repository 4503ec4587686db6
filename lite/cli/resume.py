"""`lite resume RUN`: go on with a run that was interrupted."""

from collections.abc import Sequence
from pathlib import Path

from lite.cli.options import JSON, Setting
from lite.errors import RecipeError
from lite.recipe import Recipe, expected

RUN = Setting("run", str, ("RUN",), "", "Folder of the run.", (), "Argument")
MAX_STEPS = Setting(
    "max_steps",
    int,
    ("--max-steps",),
    "INTEGER",
    "Stop there instead: more steps than the run was to take.",
    (),
    "Command",
)
TEXT = """Go on with a run that was interrupted, from its newest whole checkpoint.

What comes out is what the run would have given without the interruption. A run whose recipe or data has changed
since is refused, with what has changed."""


def main(arguments: Sequence[str]) -> int:
    """Resume as the arguments say, or show their help; return the exit status."""
    if {"-h", "--help"} & set(arguments):
        from lite.cli import help

        help.verb("lite resume RUN", TEXT, [RUN, MAX_STEPS, JSON])
        return 0
    from lite.cli.parse import parse

    given = parse(arguments, [MAX_STEPS, JSON], program="lite resume", positional="run")
    max_steps = given.get("max_steps")
    if max_steps is not None and (not isinstance(max_steps, int) or max_steps < 1):
        raise RecipeError(f"--max-steps = {max_steps!r}: expected {expected(Recipe.model_fields['max_steps'])}.")
    from lite.cli import session

    return session.resume(Path(given["run"]), max_steps=max_steps, as_json=given.get("json", False))
