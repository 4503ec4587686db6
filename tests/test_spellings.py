"""What was probably meant by a misspelt word."""

import pytest

from lite import signatures, spellings
from lite.recipe import Recipe
from lite.settings import STANDS_FOR


@pytest.mark.parametrize(
    ("word", "meant"), [("bata", "beta"), ("dat", "data"), ("lora_alfa", "lora_alpha"), ("xyz", None), ("", None)]
)
def test_nearest(word: str, meant: str | None) -> None:
    """`bata` is as like `data` as `beta`: the first letter decides."""
    assert spellings.nearest(word, ["data", "beta", "lora_alpha", "batch_size"]) == meant


def test_nothing_is_near_among_nothing() -> None:
    assert spellings.nearest("beta", []) is None


def test_every_foreign_name_leads_to_one_of_ours() -> None:
    """And none of them is a name that lite uses itself."""
    losses = signatures.registered().values()
    ours = {*Recipe.model_fields, *STANDS_FOR, *(name for loss in losses for name in loss.hyperparameters)}
    assert set(spellings.FOREIGN.values()) <= ours
    assert not spellings.FOREIGN.keys() & ours
    assert not spellings.ELSEWHERE.keys() & {*ours, *spellings.FOREIGN}
