"""Columns that stand beside a row's texts: how much it counts, and what else is known of a pair.

Of these a row's `weight` always counts. A pair's margin, its mark of an unsafe completion and the reference's
log-probs are read only where the run uses them, so that a file which brings them for something else stops nothing.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from lite.data.examples import Example, Preference, PromptCompletion, TokenExample
from lite.data.formats import Row, truth
from lite.data.problems import BadRow, shown
from lite.errors import DataError, RecipeError
from lite.recipe import Recipe

REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
BETTER = "a finite number of at least 0: below it, rejected would be the better one"
NAMES = ("weight", "margin", "chosen_score", "rejected_score", "unsafe", "rejected_safe", *REFERENCE)

# Other usual names: UltraFeedback's scores as Hugging Face and as Argilla wrote them, SafeRLHF's marks.
SYNONYMS = {
    "chosen_score": ("score_chosen", "chosen_rating", "chosen-rating"),
    "rejected_score": ("score_rejected", "rejected_rating", "rejected-rating"),
    "unsafe": ("rejected_unsafe",),
    "rejected_safe": ("is_rejected_safe",),
}


def used(recipe: Recipe) -> frozenset[str]:
    """Which of a pair's fields the run uses: margin, unsafe, ref_totals. Raises RecipeError if it cannot."""
    if recipe.safety and recipe.signature.example == "completion":
        raise RecipeError(
            f"safety = {recipe.safety:g}: {recipe.method} learns from no rejected completion, so none can count more. "
            "Leave it out."
        )
    uses = {
        "margin": "margin" in recipe.signature.data,
        "unsafe": recipe.safety > 0,
        "ref_totals": recipe.ref_columns,
    }
    return frozenset(name for name, is_used in uses.items() if is_used)


def with_columns(one: Example, row: Row, uses: Collection[str]) -> Example:
    """The example with the row's weight, and with those of a pair's fields that are used. Raises BadRow."""
    readers = {"margin": _margin, "unsafe": _unsafe, "ref_totals": _ref_totals}
    found = {name: readers[name](row) for name in uses} if isinstance(one, Preference) else {}
    if (weight := _given(row, "weight")) is not None:
        found["weight"] = _number(weight, "weight", "a number above 0", low=0, open_low=True)
    return replace(one, **found) if found else one


def weighed_for_safety(
    tokens: Sequence[TokenExample], examples: Sequence[Example], safety: float
) -> tuple[list[TokenExample], int]:
    """Token examples of which the unsafe ones weigh 1 + safety times as much, and how many these are."""
    marks = [not isinstance(example, PromptCompletion) and example.unsafe for example in examples]
    weighed = [
        replace(token_example, weight=token_example.weight * (1 + safety)) if mark else token_example
        for token_example, mark in zip(tokens, marks, strict=True)
    ]
    return weighed, sum(marks)


def require_unsafe(safety: float, marked: int, rows: int) -> None:
    """Raise DataError if no row to train on is marked, so that the setting would do nothing."""
    if not marked:
        raise DataError(
            f"safety = {safety:g}: none of the {rows} rows to train on is a pair whose rejected completion is marked "
            "unsafe.\nExpected a column `unsafe` that is true in some rows, or `rejected_safe` that is false. "
            "Name yours with --columns unsafe=YOURS, or leave out --safety."
        )


def _margin(row: Row) -> float:
    given = _given(row, "margin")
    if given is not None:
        return _number(given, "margin", BETTER, low=0)
    names = ("chosen_score", "rejected_score")
    scores = [_given(row, name) for name in names]
    if None in scores:
        raise BadRow(
            "there is no margin, by how much chosen is better: expected a number in the column margin, or in both "
            "chosen_score and rejected_score. Name yours with --columns margin=YOURS."
        )
    chosen, rejected = (_number(score, name, "a finite number") for score, name in zip(scores, names, strict=True))
    return _number(chosen - rejected, "chosen_score - rejected_score", BETTER, low=0)


def _unsafe(row: Row) -> bool:
    for name, meaning in (("unsafe", True), ("rejected_safe", False)):
        if (mark := _given(row, name)) is not None:
            said = f"true (rejected is {'unsafe' if meaning else 'safe'}) or false"
            return truth(mark, name, said) is meaning
    return False


def _ref_totals(row: Row) -> tuple[float, float]:
    given = {name: _given(row, name) for name in REFERENCE}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise BadRow(
            f"there is no {' and no '.join(missing)}, and --ref-columns takes the reference's log-probs from the data: "
            f"expected both. Name yours with --columns {missing[0]}=YOURS, or leave out --ref-columns."
        )
    said = "a finite number of at most 0, the log-probs of the completion's tokens added up"
    chosen, rejected = (_number(value, name, said, high=0) for name, value in given.items())
    return chosen, rejected


def _given(row: Row, name: str) -> Any:
    """The row's value, or None where there is none; an empty cell of a CSV file is none."""
    value = row.get(name)
    return None if isinstance(value, str) and not value.strip() else value


def _number(
    value: Any, name: str, expected: str, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or not low <= number <= high or (open_low and number == low):
        raise BadRow(f"{name} = {shown(value)}: expected {expected}.")
    return number
