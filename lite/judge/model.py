"""A model ready to judge: loaded with its adapter, looked at beside the plain one, and the layout of its examples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lite.attention.branch_attention import install
from lite.data.examples import TokenExample
from lite.data.packs import Layout
from lite.engine import layout as layouts
from lite.engine import score, selfcheck
from lite.engine.forward import Model, Path
from lite.loss.logps import Logps
from lite.model import load
from lite.recipe import Recipe
from lite.reference import precompute
from lite.train import machine
from lite.train.progress import Progress

PAIR, SINGLE = ("chosen", "rejected"), ("completion",)
Names = tuple[str, ...]  # of the completions of an example


@dataclass(frozen=True)
class Judge:
    """A model, and how examples are put before it."""

    model: Model
    layout: Layout
    path: Path

    def layout_of(self, names: Names) -> Layout:
        """The layout of examples with these completions."""
        return replace(self.layout, completions=names, scores=None)

    def logps(self, examples: Sequence[TokenExample], names: Names) -> dict[str, Logps]:
        """What it says of the completions, by their names, in the order of the examples; without gradient."""
        return score.logps(self.model, examples, self.layout_of(names), self.path)


def loaded(recipe: Recipe, examples: Sequence[TokenExample], progress: Progress) -> Judge:
    """The recipe's model, `ready`."""
    progress.stage(f"loading {recipe.model}")
    machine.make_ready(load.device(recipe))
    return ready(precompute.loaded(recipe).eval(), recipe, examples, progress)


def ready(model: Model, recipe: Recipe, examples: Sequence[TokenExample], progress: Progress) -> Judge:
    """A model that is compared with the plain forward on two of the examples unless self_check is off."""
    judge = Judge(model, layouts.layout_of(recipe, model), layouts.path_of(recipe))
    names, alike = next(iter(by_names(examples).items()))
    if not recipe.self_check:
        install(model, padded=judge.layout.padded)
        return judge
    progress.stage("comparing with the plain model")
    chosen = selfcheck.choose_layout(model, [examples[i] for i in alike], judge.layout_of(names), judge.path)
    return replace(judge, layout=chosen)


def by_names(examples: Sequence[TokenExample]) -> dict[Names, list[int]]:
    """The indices of pairs and of single completions, which are laid out apart."""
    found: dict[Names, list[int]] = {}
    for i, example in enumerate(examples):
        found.setdefault(PAIR if len(example.completions) == 2 else SINGLE, []).append(i)
    return found
