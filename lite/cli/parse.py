"""A verb's arguments to the values of its settings, through typer; what was typed wrong is told all at once."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lite import spellings
from lite.cli.options import Setting, typed
from lite.errors import RecipeError

# What typer raises for every wrong command line; of its kind it exports this subclass alone.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def parse(
    arguments: Sequence[str], settings: Sequence[Setting], *, program: str, positional: str = "", many: bool = False
) -> dict[str, Any]:
    """The value of every setting that was typed, by its key. Raises RecipeError.

    `positional` names the one argument that is no option, if the verb has any; `many`: a list of any length. Values of
    settings that the recipe would refuse pass, so that the recipe refuses them together.
    """
    annotations: dict[str, Any] = {}
    if positional:
        kind = list[str] if many else str
        annotations[positional] = Annotated[kind, typer.Argument(metavar=positional.upper(), show_default=False)]
    for setting in settings:
        kind = bool if setting.kind is bool else str
        annotations[_identifier(setting.key)] = Annotated[kind | None, typer.Option(*setting.declared)]
    try:
        given = _command(annotations, "" if many else positional).main(
            list(arguments), prog_name=program, standalone_mode=False
        )
    except UsageError as error:
        known = [name for setting in settings for name in _spellings(setting)]
        typed_flags = [argument.split("=")[0] for argument in arguments if argument.startswith("--")]
        unknown = [_unknown(name, known) for name in typed_flags if name not in known]
        lines = unknown or [error.format_message()]  # type: ignore[attr-defined]
        raise RecipeError("\n".join([*lines, f"All options: {program} --help"])) from None
    by_key = {_identifier(setting.key): setting for setting in settings}
    return {
        by_key[name].key if name in by_key else name: typed(by_key[name], value) if name in by_key else value
        for name, value in given.items()
    }


def _identifier(key: str) -> str:
    """The key as Python takes it for a parameter's name: of a sum of losses it has a dot, dpo.beta."""
    return key.replace(".", "__")


def _command(annotations: dict[str, Any], required: str) -> Any:
    """A command that returns what was typed, and only that."""

    def collect(**values: Any) -> dict[str, Any]:
        return {key: value for key, value in values.items() if value is not None}

    parameters = []
    for key, annotation in annotations.items():
        default = inspect.Parameter.empty if key == required else None
        parameters.append(
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    collect.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    collect.__annotations__ = annotations
    app = typer.Typer(add_completion=False)
    app.command()(collect)
    return typer.main.get_command(app)


def _spellings(setting: Setting) -> list[str]:
    return [name for declared in setting.declared for name in declared.split("/")]


def _unknown(flag: str, known: Sequence[str]) -> str:
    ours = spellings.foreign(_key(flag), [_key(name) for name in known])
    if ours:
        return f"{flag}: no such option. lite calls it --{ours.replace('_', '-')}."
    if instead := spellings.elsewhere(_key(flag)):
        return f"{flag}: no such option. {instead}"
    near = spellings.nearest(flag, known)
    return f"{flag}: no such option." + (f" Did you mean {near}?" if near else "")


def _key(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
