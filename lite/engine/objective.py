"""The objective of a run: its loss, or the sum of several, over what the policy and the reference say of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lite.data.packs import Batch, Pack, moved_to
from lite.engine.forward import Tokens, by_role, gather
from lite.loss import registry
from lite.loss.logps import Logps
from lite.loss.registry import Loss
from lite.signatures import Signature

Data = dict[str, Logps | Tensor]  # what losses ask for, by its name


class Summand(NamedTuple):
    """A loss within a sum."""

    loss: Loss
    weight: float
    names: Mapping[str, str]  # its hyperparameters' names → theirs in the recipe

    @property
    def share(self) -> str:
        """The way to weigh examples: a loss of single completions sees of a pair its first one."""
        if self.loss.signature.weigh_by == "examples":
            return "examples"
        return "tokens" if self.loss.signature.example == "preference" else "first"


class Sums(NamedTuple):
    """A loss and its metrics, summed over examples by their shares; one batch's packs add up to its averages."""

    loss: Tensor  # () float64
    metrics: dict[str, Tensor]  # each () float64
    weights: dict[str, Tensor]  # of each metric, the shares of the examples that have it

    @property
    def averages(self) -> dict[str, Tensor]:
        """Each metric over the examples that have it; NaN where none has."""
        return {name: value / self.weights[name] for name, value in self.metrics.items()}


@dataclass(frozen=True)
class Objective:
    """A loss with its hyperparameters, of which some may be trained; or a weighted sum of losses."""

    summands: tuple[Summand, ...]
    hyperparameters: Mapping[str, Any]
    scalars: Mapping[str, Tensor] = field(default_factory=dict)  # the trained ones, (), each in its number's place

    @classmethod
    def of(
        cls, signature: Signature, hyperparameters: Mapping[str, Any], scalars: Mapping[str, Tensor] | None = None
    ) -> "Objective":
        """The objective of a recipe's signature and hyperparameters."""
        terms = [(t.signature, t.weight, f"{t.signature.name}.") for t in signature.terms] or [(signature, 1.0, "")]
        summands = [
            Summand(registry.of(one), weight, {name: prefix + name for name in one.hyperparameters})
            for one, weight, prefix in terms
        ]
        return cls(tuple(summands), hyperparameters, scalars or {})

    @property
    def whole_batch(self) -> bool:
        """Whether a loss couples the examples of a batch."""
        return any(summand.loss.signature.whole_batch for summand in self.summands)

    def __call__(self, data: Data, shares: Mapping[str, Tensor]) -> Sums:
        """Σ share · ℓ over examples and losses, and the same of every metric. shares: each (examples,) float64."""
        # A loss of single completions learns from the chosen ones of pairs.
        aliases = {"completion": data.get("chosen"), "ref_completion": data.get("ref_chosen")}
        data = {**{name: value for name, value in aliases.items() if value is not None}, **data}
        settings = {**self.hyperparameters, **self.scalars}
        parts, metrics, weights = [], {}, {}
        for loss, weight, names in self.summands:
            scored = loss(data, {name: settings[key] for name, key in names.items()})
            share = shares[Summand(loss, weight, names).share]
            parts.append(weight * (scored.loss * share).sum())
            found = scored.metrics
            if len(self.summands) > 1:
                found = {**found, f"loss/{loss.signature.name}": scored.loss.detach()}
            for name, value in found.items():
                if name not in metrics:  # of several losses' rewards, those of the first
                    counts = ~value.isnan()
                    metrics[name] = (torch.where(counts, value, 0.0) * share).sum()
                    weights[name] = (counts * share).sum()
        return Sums(sum(parts), metrics, weights)


def of_pack(tokens: Tokens, pack: Pack) -> Data:
    """What losses ask for, of the examples that are wholly in a pack."""
    data: Data = {**by_role(tokens.logps, pack), **pack.columns}
    if pack.reference is not None:
        data.update({f"ref_{name}": logps for name, logps in by_role(pack.reference, pack).items()})
    if tokens.purity is not None:
        data.update({f"{name}_purity": logps for name, logps in by_role(tokens.purity, pack).items()})
    return data


def of_batch(tokens: Sequence[Tokens], packs: Sequence[Pack], batch: Batch) -> Data:
    """The same of a whole batch, in the order of its examples."""
    data: Data = {**gather([t.logps for t in tokens], packs), **moved_to(batch.columns, tokens[0].logps.device)}
    if packs[0].reference is not None:
        said = gather([pack.reference for pack in packs], packs)
        data.update({f"ref_{name}": logps for name, logps in said.items()})
    if tokens[0].purity is not None:
        data.update({f"{name}_purity": logps for name, logps in gather([t.purity for t in tokens], packs).items()})
    return data
