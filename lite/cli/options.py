"""A verb's options, generated: from Recipe's fields, each in its panel, shorthands, and the loss's hyperparameters.

A flag is the recipe's key with dashes. Here every value but a switch stays text, and None where the flag was not given;
`typed` makes of the text what the recipe expects, so that the recipe alone judges it, all of them at once.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from lite.hyperparameters import Hyperparameter
from lite.recipe import Recipe, expected
from lite.settings import STANDS_FOR, Shorthands
from lite.signatures import Signature

FIELDS = {**Recipe.model_fields, **Shorthands.model_fields}
NAMES = {int: "INTEGER", float: "NUMBER", bool: "", str: "TEXT", dict: "KEY=NAME,…"}


@dataclass(frozen=True)
class Setting:
    """A key of the recipe as an option: `flags` begins with the one to show."""

    key: str
    kind: Any  # int, float, bool, str or dict
    flags: tuple[str, ...]
    metavar: str
    help: str
    facts: tuple[str, ...]  # limits, default with its unit
    panel: str

    @property
    def declared(self) -> tuple[str, ...]:
        """Its flags as a parser declares them; a switch can be switched off."""
        return tuple(f"{flag}/{flag.replace('--', '--no-', 1)}" if self.kind is bool else flag for flag in self.flags)

    @property
    def left(self) -> str:
        """What is typed, as the help shows it."""
        shown = self.flags[0]
        return shown.replace("--", "--[no-]", 1) if self.kind is bool else f"{shown} {self.metavar}".rstrip()

    @property
    def right(self) -> str:
        """What it does, as the help shows it."""
        facts = "; ".join(fact for fact in self.facts if fact)
        return f"{self.help} [{facts}]" if facts else self.help


RECIPE = Setting("recipe", str, ("--recipe",), "FILE", "Settings from a YAML file; flags override them.", (), "Command")
JSON = Setting(
    "json", bool, ("--json",), "", "End stdout with one JSON object: the result.", ("default: off",), "Command"
)
OWN = (RECIPE, JSON)  # what is no setting of a run


def settings(signature: Signature) -> Iterator[Setting]:
    """Every option of a loss's verb: its hyperparameters, then the recipe's fields in their order.

    A shorthand comes before the first of what it stands for.
    """
    for hyperparameter in signature.hyperparameters.values():
        yield _of_hyperparameter(hyperparameter, signature.name.upper())
    for key in Recipe.model_fields:
        yield from (
            _of_field(word, signature) for word, stood_for in STANDS_FOR.items() if key == next(iter(stood_for))
        )
        if key != "method":
            yield _of_field(key, signature)


def typed(setting: Setting, text: Any) -> Any:
    """The value that the text of a flag stands for; text that stands for none is left for the recipe to refuse."""
    if setting.kind is dict:
        pairs = [pair.partition("=") for pair in str(text).split(",")]
        return {key.strip(): value.strip() for key, _, value in pairs} if all(p[1] and p[2] for p in pairs) else text
    if setting.kind in (int, float):
        try:
            return setting.kind(text)
        except ValueError:
            return text
    return text


def again(recipe: Recipe, keys: Iterable[str]) -> list[str]:
    """The arguments that say once more what was set of these keys, by flags or in a file."""
    by_key = {setting.key: setting for setting in settings(recipe.signature)}
    said = []
    for key in keys:
        value = getattr(recipe, key)
        if key not in recipe.model_fields_set or value is None:
            continue
        name = by_key[key].flags[0]
        if isinstance(value, bool):
            said.append(name if value else name.replace("--", "--no-", 1))
        elif value != {}:
            text = ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            said += [name, text]
    return said


def otherwise(recipe: Recipe, keys: Iterable[str]) -> list[str]:
    """The arguments for what these keys, and the loss's own settings, have other than their defaults."""
    changed = [key for key in keys if getattr(recipe, key) != Recipe.model_fields[key].default]
    said = again(recipe, changed)
    for name, value in recipe.hyperparameters.items():
        if value != recipe.signature.hyperparameters[name].default:
            said += [flag(name) if value is not False else flag(name).replace("--", "--no-", 1)]
            said += [] if isinstance(value, bool) else [str(value)]
    return said


def flag(key: str) -> str:
    """The flag of a key."""
    return "--" + key.replace("_", "-")


def _of_field(key: str, signature: Signature) -> Setting:
    field = FIELDS[key]
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    kind = kinds[0] if type(None) in get_args(field.annotation) else field.annotation
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    kind = str if choices else get_origin(kind) or kind
    unit = f" {extra['unit']}" if extra["unit"] else ""
    default = signature.learning_rate if key == "learning_rate" else field.default
    shown = "" if default is None or default == {} else f"default: {_shown(default)}{unit}"
    if extra["planned"]:
        shown = f"default: the plan's choice{unit and f',{unit}'}"
    in_recipe = f"in a recipe: {key}" if extra["flag"] else ""
    return Setting(
        key=key,
        kind=kind,
        flags=(extra["flag"], flag(key)) if extra["flag"] else (flag(key),),
        metavar="|".join(choices) or NAMES[kind],
        help=field.description or "",
        facts=("" if choices or kind is dict else expected(field).partition(", ")[2], shown or unit.strip(), in_recipe),
        panel=extra["panel"],
    )


def _of_hyperparameter(hyperparameter: Hyperparameter, panel: str) -> Setting:
    return Setting(
        key=hyperparameter.name,
        kind=hyperparameter.type,
        flags=(flag(hyperparameter.name),),
        metavar="|".join(hyperparameter.choices) or NAMES[hyperparameter.type],
        help=hyperparameter.help[:1].upper() + hyperparameter.help[1:],
        facts=(
            hyperparameter.range.words if hyperparameter.range else "",
            f"default: {_shown(hyperparameter.default)}",
        ),
        panel=panel,
    )


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)
