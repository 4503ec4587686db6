"""A verb that trains: file and flags to a Recipe, the run, and what is said at its end."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lite
from lite import recipe as recipes
from lite import signatures
from lite.cli import options
from lite.errors import RecipeError, raise_collected
from lite.settings import override

BUNDLED_RECIPE = Path(lite.__file__).parent / "bundled" / "recipe.yaml"
NAMED_BY_USER = {"model", "data", "run", "adapter"}  # with none of them and no file, the bundled example is meant


def main(method: str, arguments: Sequence[str]) -> int:
    """Train by `method` as the arguments say, or show their help; return the exit status."""
    if {"-h", "--help"} & set(arguments):
        from lite.cli import help

        signature = signatures.find(method, _losses(arguments))
        text = f"{signature.summary}\n\n{signature.explanation}".rstrip()
        help.verb(f"lite {method}", text, [*options.settings(signature), *options.OWN])
        return 0
    recipe, as_json = understood(method, arguments)
    from lite.cli import session

    return session.train(recipe, as_json=as_json)


def method_of(
    verb: str,
    arguments: Sequence[str],
    text: str,
    *,
    able: Sequence[str],
    settings: Callable[[str], Iterable[options.Setting]],
) -> str | None:
    """The method that another verb is about, `orpo` in `lite plan orpo`; None where its help is wanted, which is shown.

    able: the methods that it can be about; settings: what the help of one of them lists. Raises RecipeError.
    """
    method = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if {"-h", "--help"} & set(arguments):
        from lite.cli import help

        example = f"METHOD: {', '.join(able)}. `lite {verb} {able[0]} --help`: its options."
        help.verb(
            f"lite {verb} {method or 'METHOD'}",
            text if method else f"{text}\n\n{example}",
            settings(method) if method else [],
        )
        return None
    if method is None:
        raise RecipeError(f"lite {verb}: for which method? Expected one of {', '.join(able)}.")
    return method


def understood(method: str, arguments: Sequence[str], *, program: str | None = None) -> tuple[recipes.Recipe, bool]:
    """What was typed: the recipe, and whether the result is to be JSON. Raises RecipeError."""
    recipe, besides = parsed(method, arguments, options.OWN, program=program or f"lite {method}")
    return recipe, besides.get("json", False)


def parsed(
    method: str, arguments: Sequence[str], own: Sequence[options.Setting], *, program: str
) -> tuple[recipes.Recipe, dict[str, Any]]:
    """What was typed: the recipe, and by key those of the verb's `own` settings, which are none of a run's.

    Raises RecipeError.
    """
    from lite.cli.parse import parse

    settings = [*options.settings(signatures.find(method, _losses(arguments))), *own]
    given = parse(arguments, settings, program=program)
    besides = {setting.key: given.pop(setting.key) for setting in own if setting.key in given}
    file = besides.pop("recipe", None)
    if file is None and not given.keys() & NAMED_BY_USER:
        file = _from_here(BUNDLED_RECIPE)
        print(f"no --model, no --data: the bundled example, settings from {file}", file=sys.stderr)
    return compose(method, given, file=Path(file) if file else None), besides


def compose(method: str, given: Mapping[str, Any], *, file: Path | None = None) -> recipes.Recipe:
    """The recipe of defaults, the file's settings and the flags', the later first.

    Raises RecipeError with every setting that cannot be used, named as the user wrote it: by its flag or in the file.
    """
    in_file = recipes.read_yaml(file) if file else {}
    if in_file.get("method", method) != method:
        raise RecipeError(
            f"{file}: method = {in_file['method']}, but the verb is {method}.\n"
            f"Type `lite {in_file['method']} --recipe {file}`, or take the line out of the file."
        )
    values = override(in_file, {**given, "method": method})
    losses = values.get("loss")
    signature = signatures.find(method, losses if isinstance(losses, str) else None)
    shown = {setting.key: setting.flags[0] for setting in options.settings(signature)}

    def named(key: str) -> str:
        return shown[key] if key in given else f"{file}: {key}" if key in in_file else key

    found = [named(problem.key) + problem.text for problem in recipes.problems(values)]
    raise_collected(RecipeError, recipes.HEADLINE, found)
    return recipes.Recipe(**values)


def _losses(arguments: Sequence[str]) -> str | None:
    """The sum of losses that is asked for, by flag or in the recipe's file: it decides which options there are."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--loss", "--recipe") and (equals or i + 1 < len(arguments)):
            value = value if equals else arguments[i + 1]
            if name == "--loss":
                return value
            found = recipes.read_yaml(Path(value)).get("loss") if Path(value).is_file() else None
            if isinstance(found, str) and "--loss" not in [a.partition("=")[0] for a in arguments]:
                return found
    return None


def _from_here(path: Path) -> Path:
    """The path as seen from the working directory, if it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
