"""Balance: how many rows are desirable, how many not, and what weights make up for the difference."""

import math
from collections.abc import Callable, Sequence

from lite.data.examples import TokenExample

LOWEST, HIGHEST = 1.0, 4 / 3


def advice(examples: Sequence[TokenExample], desirable_weight: float, undesirable_weight: float) -> str | None:
    """What to do where the kinds of rows do not balance, in a sentence or two; None where they do.

    Balanced: LOWEST ≤ desirable_weight · n_desirable / (undesirable_weight · n_undesirable) ≤ HIGHEST; a row counts
    as much as its own weight.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, on imbalanced data.
    """
    weights = {label: [e.weight for e in examples if e.label is label] for label in (True, False)}
    desirable, undesirable = (sum(weights[label]) for label in (True, False))
    if not weights[True] and not weights[False]:
        return None
    if not weights[True] or not weights[False]:
        kinds = ("desirable", "undesirable") if weights[True] else ("undesirable", "desirable")
        return (
            f"all {len(examples)} rows are {kinds[0]}: nothing is compared, and what they have in common, good or bad, "
            f"is all that can be learned. Add {kinds[1]} rows."
        )
    up, down = desirable_weight * desirable, undesirable_weight * undesirable
    ratio = up / down if down else math.inf
    if LOWEST - 1e-9 <= ratio <= HIGHEST + 1e-9:
        return None
    advised = []
    if down:
        advised.append(_range("desirable_weight", down / desirable * LOWEST, down / desirable * HIGHEST))
    if up:
        advised.append(_range("undesirable_weight", up / undesirable / HIGHEST, up / undesirable / LOWEST))
    return (
        f"{len(weights[True])} rows are desirable and {len(weights[False])} undesirable, which count {ratio:.3g} to 1 "
        f"with desirable_weight {desirable_weight:g} and undesirable_weight {undesirable_weight:g}; KTO advises 1 to "
        f"{HIGHEST:.3g}. Take {', or '.join(advised or ['a weight above 0'])}."
    )


def _range(name: str, low: float, high: float) -> str:
    """The range in three digits, rounded inwards, so that both of its ends are in it."""
    return f"{name} {_rounded(low, math.ceil):g} to {_rounded(high, math.floor):g}"


def _rounded(value: float, towards: Callable[[float], int]) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return towards(round(value / unit, 6)) * unit
