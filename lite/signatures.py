"""Losses as the command line sees them: read from their source with `ast`, so that no torch is imported.

A loss is one function under `@loss(...)`. Its positional parameters are its data, its keyword-only parameters its
hyperparameters: each becomes a recipe key, a flag and a help line. The function's name is the verb of the command line.
A loss of the user's own is named `path/to/file.py:function` and read the same way.
"""

import ast
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lite import spellings
from lite.errors import RecipeError

LOSSES = Path(__file__).parent / "loss" / "losses.py"

# What the engine can supply by name, and what each is. A loss that asks for anything else fails at import.
KNOWN_DATA = {
    "chosen": "Logps of the preferred completion, one per pair",
    "rejected": "Logps of the other completion, one per pair",
    "completion": "Logps of the completion, one per example",
    "prompt": "Logps of the prompt's own tokens after its first, one per example (only where `prompt_when` holds)",
    "label": "bool tensor, true where the completion is desirable",
}
NON_NEGATIVE = "NonNegative"  # lite.loss.registry.NonNegative: a float of 0 or more
TYPES = {"float": float, "int": int, "bool": bool, "str": str, NON_NEGATIVE: float}
WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Hyperparameter:
    """A keyword-only parameter of a loss: `choices` is empty unless it is a Literal."""

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    non_negative: bool = False

    def problem(self, value: Any) -> str | None:
        """Why `value` cannot be used, or None."""
        if self.choices:
            fits = value in self.choices
        elif self.type is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            fits = fits and (value >= 0 or not self.non_negative)
        else:
            fits = type(value) is self.type
        return None if fits else f"{self.name} = {value!r}: expected {self.expected}."

    @property
    def expected(self) -> str:
        """What it takes, in words."""
        words = f"one of {', '.join(self.choices)}" if self.choices else WORDS[self.type]
        return f"{words}, at least 0" if self.non_negative else words


@dataclass(frozen=True)
class Signature:
    """A loss as its source states it."""

    name: str
    path: Path
    summary: str  # first line of the docstring
    explanation: str  # the rest of it, without the lines of the hyperparameters
    data: tuple[str, ...]
    hyperparameters: dict[str, Hyperparameter]
    learning_rate: float = 2e-5  # for adapters; the method's paper gives that of full fine-tuning
    weigh_by: str = "examples"  # "examples": 1 each; "tokens": its scored tokens
    whole_batch: bool = False  # needs every Logps of the step before any gradient
    prompt_when: dict[str, str] | None = None  # hyperparameter values under which `prompt` is scored too

    @property
    def example(self) -> str:
        """The type of example it learns from: preference, unpaired or completion."""
        return "preference" if "chosen" in self.data else "unpaired" if "label" in self.data else "completion"

    @property
    def completions(self) -> tuple[str, ...]:
        """The completions of one example, in the order in which they are scored."""
        return ("chosen", "rejected") if self.example == "preference" else ("completion",)

    def scores_prompt(self, hyperparameters: dict[str, Any]) -> bool:
        """Whether the prompt's own tokens are scored under these hyperparameters."""
        return bool(self.prompt_when) and all(hyperparameters[k] == v for k, v in self.prompt_when.items())


def find(method: str) -> Signature:
    """The signature of a registered loss, or of `file.py:function`. Raises RecipeError with the nearest names."""
    path, _, name = method.rpartition(":")
    if path and not Path(path).is_file():
        raise RecipeError(f"method = {method!r}: there is no file {path}. Expected path/to/file.py:function.")
    known = read(Path(path) if path else LOSSES)
    if name not in known:
        if not known:
            raise RecipeError(f"method = {method!r}: {path} has no function under `@loss` at the top of the module.")
        near = spellings.nearest(name, known)
        meant = f" Did you mean {near}?" if near else ""
        raise RecipeError(f"method = {method!r}: no such loss in {path or 'lite'}.{meant} Known: {', '.join(known)}.")
    return known[name]


@cache
def read(path: Path) -> dict[str, Signature]:
    """Every function under `@loss` in a source file, in the file's order."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise RecipeError(f"{path}:{error.lineno}: {error.msg}. Losses are read from Python source.") from None
    found = {}
    for node in tree.body:
        for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            function, keywords = (
                (decorator.func, decorator.keywords) if isinstance(decorator, ast.Call) else (decorator, [])
            )
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name == "loss":
                place = f"{path}:{node.lineno}"
                options = {str(keyword.arg): _literal(keyword.value, place) for keyword in keywords}
                found[node.name] = _signature(node, path, options)
    return found


def _signature(node: ast.FunctionDef, path: Path, options: dict[str, Any]) -> Signature:
    doc = ast.get_docstring(node) or ""
    arguments = node.args
    data = tuple(a.arg for a in arguments.posonlyargs + arguments.args)
    unknown = [name for name in data if name not in KNOWN_DATA]
    if unknown:
        known = "\n".join(f"  {name}: {what}" for name, what in KNOWN_DATA.items())
        raise RecipeError(f"{path}:{node.lineno}: {node.name} asks for {', '.join(unknown)}. Known data:\n{known}")
    optional = {"learning_rate", "weigh_by", "whole_batch", "prompt_when"}
    if options.keys() - optional:
        wrong = ", ".join(sorted(options.keys() - optional))
        raise RecipeError(f"{path}:{node.lineno}: @loss has no option {wrong}. Known: {', '.join(sorted(optional))}.")
    hyperparameters = {}
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        place = f"{path}:{argument.lineno}"
        if default is None or argument.annotation is None:
            raise RecipeError(
                f"{place}: {node.name}'s hyperparameter {argument.arg} needs a type and a default, "
                "for it becomes a setting."
            )
        kind, choices = _type(argument.annotation, place)
        line = re.search(_help_line(argument.arg), doc, re.MULTILINE)
        help_line = line.group(1) if line else ""
        non_negative = ast.unparse(argument.annotation) == NON_NEGATIVE
        value = _literal(default, place)
        hyperparameters[argument.arg] = Hyperparameter(argument.arg, kind, value, help_line, choices, non_negative)
    summary, _, explanation = doc.partition("\n")
    for name in hyperparameters:
        explanation = re.sub(_help_line(name) + r"\n?", "", explanation, flags=re.MULTILINE)
    return Signature(node.name, path, summary, explanation.strip(), data, hyperparameters, **options)


def _help_line(name: str) -> str:
    return rf"^ *{name}: (.+)$"


def _literal(value: ast.expr, place: str) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        raise RecipeError(
            f"{place}: {ast.unparse(value)} is computed. Expected a plain value, read without running it."
        ) from None


def _type(annotation: ast.expr, place: str) -> tuple[type, tuple[str, ...]]:
    if isinstance(annotation, ast.Name) and annotation.id in TYPES:
        return TYPES[annotation.id], ()
    if isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", "") == "Literal":
        values = ast.literal_eval(annotation.slice)
        return str, values if isinstance(values, tuple) else (values,)
    expected = f"{', '.join(TYPES)} or Literal[…]"
    raise RecipeError(
        f"{place}: a hyperparameter of type {ast.unparse(annotation)} cannot be a flag. Expected {expected}."
    )
