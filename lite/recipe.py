"""Recipe: the settings of a run, judged together, loaded and saved.

A recipe is flat. Beside the fields of `Settings` it carries the hyperparameters of its loss (`beta: 0.1`), which the
loss's signature owns; `recipe.hyperparameters` is all of them, set or default. Precedence: defaults < file < flags.
"""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lite import flat_yaml, hyperparameters, signatures
from lite.errors import RecipeError, raise_collected
from lite.flat_yaml import read as read_yaml
from lite.misfits import Problem, misfits
from lite.settings import BUNDLED, Settings, expanded, override

__all__ = [
    "BUNDLED",
    "HEADLINE",
    "Problem",
    "Recipe",
    "expected",
    "load",
    "planned_settings",
    "problems",
    "read_yaml",
]

HEADLINE = "The recipe cannot be used:"


class Recipe(Settings):
    """Every setting of a run. Raises RecipeError naming each wrong key and value at once."""

    def __init__(self, **values: Any) -> None:
        values = {key: str(value) if isinstance(value, PurePath) else value for key, value in values.items()}
        found = misfits(values, Recipe.model_fields)
        try:
            super().__init__(**expanded(values))
        except ValidationError as error:
            found = [*_wrong_values(error), *found]
        raise_collected(RecipeError, HEADLINE, [problem.key + problem.text for problem in found])

    def __eq__(self, other: object) -> bool:
        """Recipes are equal if they make the same run; one may state what the other leaves to defaults."""
        return isinstance(other, Recipe) and self.resolved() == other.resolved()

    __hash__ = None  # type: ignore[assignment]

    @property
    def signature(self) -> signatures.Signature:
        """The loss's signature."""
        return signatures.find(self.method, self.loss)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Every hyperparameter of the loss: as set here, else its default."""
        set_here = self.model_extra or {}
        return {name: set_here.get(name, h.default) for name, h in self.signature.hyperparameters.items()}

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that was set, else the loss's own, which is for adapters; of full by AdamW, a tenth of it.

        Source: Schulman et al. 2025, "LoRA Without Regret": an adapter learns best at about ten times the rate of
        full training. GaLore keeps the loss's own: its updates are multiplied by galore_scale.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        whole = self.full and not self.optimizer.startswith("galore")
        return self.signature.learning_rate / 10 if whole else self.signature.learning_rate

    @property
    def peak_vector_learning_rate(self) -> float:
        """Under GaLore, the rate of what is not projected: as set, else that with which projected updates arrive."""
        if self.vector_learning_rate is not None:
            return self.vector_learning_rate
        return self.peak_learning_rate * self.galore_scale

    def resolved(self) -> dict[str, Any]:
        """Every setting, hyperparameters included, with its value: what a run saves and what reruns it."""
        warmup = {"warmup_ratio": 0.0} if self.lr_scheduler_type == "constant" else {}
        return {**self.model_dump(), "learning_rate": self.peak_learning_rate, **warmup, **self.hyperparameters}

    def save(self, path: Path) -> None:
        """Write every setting as YAML."""
        path.write_text(flat_yaml.dump(self.resolved()), encoding="utf-8")


def planned_settings() -> tuple[str, ...]:
    """The settings that the plan of a run chooses where they are None."""
    return tuple(key for key, field in Recipe.model_fields.items() if field.json_schema_extra["planned"])


def problems(values: Mapping[str, Any]) -> list[Problem]:
    """Everything for which `Recipe(**values)` would raise, so that a caller can name each setting as the user did."""
    try:
        BaseModel.__init__(Recipe.__new__(Recipe), **expanded(values))
    except ValidationError as error:
        return [*_wrong_values(error), *misfits(values, Recipe.model_fields)]
    return misfits(values, Recipe.model_fields)


def load(path: Path | None = None, **overrides: Any) -> Recipe:
    """A recipe from a YAML file (or from defaults), with `overrides` on top. Raises RecipeError."""
    return Recipe(**override(read_yaml(path) if path else {}, overrides))


def expected(field: FieldInfo) -> str:
    """What a field takes, in words: `a whole number, at least 1`."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    kind = kinds[0] if type(None) in get_args(field.annotation) else field.annotation
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    words = [hyperparameters.WORDS.get(kind, "pairs such as prompt=question (in a recipe, `prompt: question`)")]
    for limit in field.metadata:
        for name, word in (("ge", "at least"), ("gt", "above"), ("lt", "below"), ("le", "at most")):
            if hasattr(limit, name):
                words.append(f"{word} {getattr(limit, name)}")
    return ", ".join(words)


def _wrong_values(error: ValidationError) -> list[Problem]:
    """Each value of the wrong type or out of its range, once."""
    found = {}
    for detail in error.errors():
        key = str(detail["loc"][0])
        found.setdefault(key, Problem(key, f" = {detail['input']!r}: expected {expected(Recipe.model_fields[key])}."))
    return list(found.values())
