"""What if: what other losses and other betas would make of a run's held-out rows, without a model.

A loss is a function of log-probs, and the run kept the policy's at each evaluation. So its value under any beta is a
matter of milliseconds, and its gradient with respect to each completion's log-prob says how much each pair still pulls:
a beta too large saturates the pairs early, one too small leaves them pulling long after they are learnt.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lite.engine.objective import Data, Objective
from lite.errors import RecipeError
from lite.judge import kept
from lite.judge.candidates import Candidate, choose
from lite.judge.kept import Kept
from lite.loss.logps import Logps
from lite.recipe import Recipe
from lite.train import metrics, run

BETAS = (0.01, 0.05, 0.1, 0.3, 1.0)
SATURATED = 0.05  # of its pull at margin 0: a pair that pulls no more than that is saturated


class Outcome(NamedTuple):
    """What one loss with one beta makes of the held-out rows at one step; NaN where the loss has no such number.

    The pull of a row is |∂ℓ / ∂ log p|, the mean over its completions, when every token of one moves alike. Margin 0 is
    where policy and reference agree; for a loss without a reference, where the other completion is like the one that is
    pulled. A term of likelihood (orpo, cpo, rpo) pulls on chosen at any margin.
    """

    step: int
    method: str
    settings: dict[str, Any]  # hyperparameters beside beta that are not at their defaults
    beta: float | None
    own: bool  # whether it is the run's own loss, at the run's own settings and beta
    loss: float
    saturated: float  # share of the rows whose pull is at most 5 % of their pull at margin 0
    gradient: float  # mean pull / beta: ½ for DPO at margin 0, towards 1 for pairs that are wrong
    gradient_weight: float  # mean pull / mean pull at margin 0: 1 at margin 0 whatever the loss
    accuracy: float  # rewards/accuracies
    margin: float  # rewards/margins

    @property
    def name(self) -> str:
        """The loss, with the settings that tell it from its defaults: `dpo hinge`."""
        told = (str(v) if k == "variant" else f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}"
                for k, v in self.settings.items())  # fmt: skip
        return " ".join([self.method, *told])


class WhatIf(NamedTuple):
    """A table of outcomes, the run's own loss first, each loss in the order of the betas."""

    run: str
    rows: int
    reference: str | None  # where the reference's log-probs come from: the run, the cache, or nowhere
    outcomes: list[Outcome]
    left_out: dict[str, str]  # losses of the same kind of rows that cannot be tried, and why


def what_if(
    folder: str | Path,
    *,
    betas: Sequence[float] | None = None,
    losses: Sequence[str] | None = None,
    step: int | None = None,
    cache: str | Path | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> WhatIf:
    """Every loss that fits, at every beta, on the held-out rows as they stood at `step`, the last one by default.

    betas: BETAS and the run's own by default. losses: names, instead of all that fit. cache: its folder, if not the
    run's. Losses that compare across a batch see all rows as one. Raises RunError and RecipeError.
    """
    folder, recipe = _opened(folder, cache)
    found = kept.read(folder, recipe, step, note)
    choice = choose(recipe, found.data, trained=_trained(folder, recipe, found.step), only=losses)
    own = next((c.beta for c in choice.candidates if c.own), None)
    tried = _checked(betas) if betas is not None else sorted({*BETAS, *([] if own is None else [own])})
    outcomes = [
        _outcome(candidate, beta, found)
        for candidate in choice.candidates
        for beta in (tried if candidate.beta_key else [None])
    ]
    return WhatIf(str(folder), found.rows, found.reference, outcomes, choice.left_out)


def course(
    folder: str | Path,
    *,
    betas: Sequence[float] | None = None,
    cache: str | Path | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> WhatIf:
    """The run's own loss at every step of which something was kept, at its own beta or at those given."""
    folder, recipe = _opened(folder, cache)
    steps = kept.steps_of(folder)
    outcomes, last = [], None
    for step in steps:
        last = kept.read(folder, recipe, step, note if step == steps[0] else lambda _: None)
        choice = choose(recipe, last.data, trained=_trained(folder, recipe, step), only=[recipe.signature.name])
        candidate = choice.candidates[0]
        tried = _checked(betas) if betas is not None and candidate.beta_key else [candidate.beta]
        outcomes += [_outcome(candidate, beta, last) for beta in tried]
    return WhatIf(str(folder), last.rows, last.reference, outcomes, {})


def _opened(folder: str | Path, cache: str | Path | None) -> tuple[Path, Recipe]:
    recipe = run.opened(Path(folder))
    return Path(folder), recipe if cache is None else recipe.model_copy(update={"cache": str(cache)})


def _checked(betas: Sequence[float]) -> list[float]:
    wrong = [beta for beta in betas if not 0 < beta < math.inf]
    if wrong or not betas:
        raise RecipeError(f"--beta {', '.join(map(str, wrong))}: expected numbers above 0, such as 0.05,0.1,0.3.")
    return list(dict.fromkeys(betas))


def _trained(folder: Path, recipe: Recipe, step: int) -> dict[str, float]:
    """The values that the loss's own trained numbers had at a step, as the evaluation logged them."""
    logged = metrics.evaluation(folder / metrics.METRICS, step) or {}
    named = {key: f"eval_{key.rpartition('.')[2]}" for key in recipe.signature.learnable}
    return {key: logged[name] for key, name in named.items() if name in logged}


def _outcome(candidate: Candidate, beta: float | None, found: Kept) -> Outcome:
    objective, shares = candidate.at(beta), _shares(found)
    with torch.no_grad():
        sums = objective(found.data, shares)
    pulls = _mean(_pulls(objective, found.data, shares))
    zero = _at_margin_zero(objective, found.data, shares, reference=candidate.signature.reference)
    share = shares["examples"]
    mean = float((pulls * share).sum())
    of_zero = math.nan if zero is None else float((zero * share).sum())
    saturated = math.nan if zero is None else float(((pulls <= SATURATED * zero) * share).sum())
    averages = {name: float(value) for name, value in sums.averages.items()}
    return Outcome(
        step=found.step,
        method=candidate.signature.name,
        settings=candidate.settings,
        beta=beta,
        own=candidate.own and beta == candidate.beta,
        loss=float(sums.loss),
        saturated=saturated,
        gradient=mean / beta if beta else math.nan,
        gradient_weight=mean / of_zero if of_zero else math.nan,
        accuracy=averages.get("rewards/accuracies", math.nan),
        margin=averages.get("rewards/margins", math.nan),
    )


def _completions(data: Data) -> list[str]:
    """A row's own completions; of one that is learnt from the reference's words, those."""
    return [name for name in ("chosen", "rejected", "completion") if name in data] or ["expected"]


def _shares(found: Kept) -> dict[str, Tensor]:
    """Each row's share of the whole, by each way to weigh: see `lite.data.packs.weights_of`."""
    lengths = [found.data[name].length for name in _completions(found.data)]
    weights = {
        "examples": found.weights,
        "tokens": found.weights * sum(lengths),
        "first": found.weights * lengths[0],
    }
    return {name: weight / weight.sum() for name, weight in weights.items()}


def _pulls(objective: Objective, data: Data, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|∂ℓ / ∂ log p| of each completion, (B,) each."""
    names = _completions(data)
    tokens = [data[name].tokens.detach().clone().requires_grad_() for name in names]
    moved = {name: Logps(of_name, data[name].offsets) for name, of_name in zip(names, tokens, strict=True)}
    sums = objective({**data, **moved}, shares)
    gradients = torch.autograd.grad(sums.loss, tokens, materialize_grads=True)
    # A total moves by as much as its tokens do together, so its derivative is the mean of theirs.
    return {
        name: Logps(gradient, data[name].offsets).mean.abs() / shares["examples"]
        for name, gradient in zip(names, gradients, strict=True)
    }


def _at_margin_zero(
    objective: Objective, data: Data, shares: Mapping[str, Tensor], *, reference: bool
) -> Tensor | None:
    """The pull of each row where nothing has been learnt yet, (B,); None where that means nothing."""
    if reference:
        start = {name: data[f"ref_{name}"] for name in data if f"ref_{name}" in data}
        return _mean(_pulls(objective, {**data, **start}, shares))
    if "rejected" not in data:
        return None
    pair = ("chosen", "rejected")
    return _mean({name: _pulls(objective, {**data, **dict.fromkeys(pair, data[name])}, shares)[name] for name in pair})


def _mean(pulls: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(pulls.values())).mean(0)
