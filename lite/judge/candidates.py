"""Candidates: the losses that can be made of what a run kept of its held-out rows, and why the others cannot."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lite import signatures, spellings
from lite.engine.objective import Objective
from lite.errors import RecipeError
from lite.recipe import Recipe
from lite.signatures import Signature

VARIANT = "variant"  # a hyperparameter of this name makes a family of a loss: each of its choices is a candidate


@dataclass(frozen=True)
class Candidate:
    """A loss to try: its hyperparameters, of which beta is put in later."""

    signature: Signature
    hyperparameters: Mapping[str, Any]
    beta_key: str | None  # of the hyperparameter that is its beta
    own: bool = False  # whether the run was trained by it

    @property
    def beta(self) -> float | None:
        """The run's own beta, or the loss's default; None if it has none."""
        return None if self.beta_key is None else float(self.hyperparameters[self.beta_key])

    @property
    def settings(self) -> dict[str, Any]:
        """Its hyperparameters beside beta that are not at the loss's defaults."""
        default = {name: hyperparameter.default for name, hyperparameter in self.signature.hyperparameters.items()}
        return {k: v for k, v in self.hyperparameters.items() if k != self.beta_key and v != default[k]}

    def at(self, beta: float | None) -> Objective:
        """The loss with this beta."""
        chosen = {} if self.beta_key is None else {self.beta_key: beta}
        return Objective.of(self.signature, {**self.hyperparameters, **chosen})


class Choice(NamedTuple):
    """The losses that can be tried, the run's own first; and by name why others of the same rows cannot."""

    candidates: list[Candidate]
    left_out: dict[str, str]


def choose(
    recipe: Recipe, have: Collection[str], *, trained: Mapping[str, float], only: Sequence[str] | None
) -> Choice:
    """What fits a run of `recipe` that kept the data named in `have`.

    trained: the values of its learnable hyperparameters. only: names of losses, instead of all that learn from the same
    type of example. Raises RecipeError for a name that is no such loss, or whose loss cannot be tried, saying why.
    """
    own = _own(recipe, trained)
    # In a sum, a loss of single completions learns from the chosen ones of pairs.
    have = {*have, *(name.replace("chosen", "completion") for name in have if name in ("chosen", "ref_chosen"))}
    every = [own]
    for signature in signatures.registered().values():
        if signature.example == own.signature.example:
            every += [c for c in _variants(signature) if (signature, c.settings) != (own.signature, own.settings)]
    found = Choice([], {})
    for candidate in every:
        lacking = [name for name in _needs(candidate) if name not in have]
        if lacking:
            found.left_out[candidate.signature.name] = _why(lacking)
        else:
            found.candidates.append(candidate)
    return found if only is None else _among(found, only)


def _own(recipe: Recipe, trained: Mapping[str, float]) -> Candidate:
    signature = recipe.signature
    beta = next((key for key in ("beta", f"{recipe.method}.beta") if key in signature.hyperparameters), None)
    return Candidate(signature, {**recipe.hyperparameters, **trained}, beta, own=True)


def _variants(signature: Signature) -> Iterator[Candidate]:
    """A loss at its defaults, and at each choice of its variant."""
    defaults = {name: hyperparameter.default for name, hyperparameter in signature.hyperparameters.items()}
    family = signature.hyperparameters.get(VARIANT)
    beta = "beta" if "beta" in defaults else None
    for choice in family.choices if family else ():
        yield Candidate(signature, {**defaults, VARIANT: choice}, beta)
    if not family:
        yield Candidate(signature, defaults, beta)


def _needs(candidate: Candidate) -> list[str]:
    """The data that it asks for under its hyperparameters."""
    signature = candidate.signature
    return [name for name in signature.data if name != "prompt" or signature.scores_prompt(candidate.hyperparameters)]


def _why(lacking: Sequence[str]) -> str:
    if all(name.startswith("ref_") for name in lacking):
        return "it compares with a reference, whose log-probs of these rows are neither in the run nor in the cache"
    return f"it needs {', '.join(lacking)}, which this run did not keep"


def _among(found: Choice, only: Sequence[str]) -> Choice:
    names = list(dict.fromkeys(candidate.signature.name for candidate in found.candidates))
    for name in only:
        if name in found.left_out:
            raise RecipeError(f"--loss {name}: it cannot be tried on this run: {found.left_out[name]}.")
        if name not in names:
            near = spellings.nearest(name, [*names, *found.left_out])
            meant = f" Did you mean {near}?" if near else ""
            raise RecipeError(f"--loss {name}: no such loss of these rows.{meant} Expected of {', '.join(names)}.")
    return Choice([c for c in found.candidates if c.signature.name in only], {})
