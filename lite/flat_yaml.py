"""The YAML of recipes: one flat mapping, in the scalars that people mean."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lite.errors import RecipeError


def read(path: Path) -> dict[str, Any]:
    """A flat YAML file as a dict; `1e-5` is a number, booleans are true and false. Raises RecipeError."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}. Expected a recipe in YAML.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    if values is None:  # nothing but comments: every setting at its default
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected `key: value` lines, found {type(values).__name__}.")
    named = {str(key).replace("-", "_"): value for key, value in values.items()}
    if len(named) < len(values):
        raise RecipeError(f"{path}: a setting is there twice, with a dash and with an underscore. Keep one of them.")
    return named


def dump(values: dict[str, Any]) -> str:
    """The YAML that `read` gives back as the same values: text that it would take for a number is quoted."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of its version 1.2 where 1.1 surprises, and no key twice.

    1.1 reads 1e-5 as a string, for want of a dot; `yes`, `no`, `on` and `off` as booleans; 2024-01-01 as a date; 012 as
    10 and 1:30 as 90.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep)
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or this module's loader would not read as text."""


_SURPRISING = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int")
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag not in _SURPRISING]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
