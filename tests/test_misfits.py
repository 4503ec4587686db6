"""Settings of the reference that leave each other, or the loss, without meaning."""

import pytest

from lite.errors import RecipeError
from lite.recipe import Recipe


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "orpo", "ref": "other"}, "ref = 'other': orpo has no reference"),
        ({"method": "sft", "refresh_reference": 5}, "refresh_reference = 5: sft has no reference"),
        ({"method": "dpo", "top_k": 8}, "top_k = 8: dpo does not learn from the reference's words"),
        ({"method": "dpo", "ref_adapter": "a"}, "ref_adapter = 'a' without ref"),
        ({"method": "distill"}, "distill learns from another model, and none is named"),
        ({"method": "dpo", "ref": "other", "refresh_reference": 5}, "refresh_reference = 5 beside ref"),
        ({"method": "dpo", "ref_columns": True, "ref": "other"}, "ref = 'other' beside ref_columns"),
        ({"method": "kto", "ref_columns": True}, "kto needs more than the totals of pairs"),
        ({"method": "ld_dpo", "ref_columns": True}, "ld_dpo needs more than the totals of pairs"),
        ({"loss": "dpo:1,ld_dpo:1", "method": "dpo", "ref_columns": True}, "needs more than the totals of pairs"),
    ],
    ids=str,
)
def test_what_excludes_each_other(settings: dict, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Recipe(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dpo", "ref": "other", "ref_adapter": "a", "ref_load_in_4bit": True},
        {"method": "wpo", "ref_columns": True},
        {"method": "dpo", "loss": "dpo:1,distill:0.1", "top_k": 8, "refresh_reference": 5},
    ],
    ids=str,
)
def test_what_goes_together(settings: dict) -> None:
    assert Recipe(**settings).signature.reference


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"f_alpha": 0.3}, "f_alpha = 0.3 counts only with f_divergence = alpha"),
     ({"temperature": 0.3, "variant": "hinge"}, "temperature = 0.3 counts only with variant = discopop"),
     ({"loss": "dpo:1,sft:1", "dpo.temperature": 0.3}, "dpo.temperature = 0.3 counts only with dpo.variant")],
)  # fmt: skip
def test_a_setting_of_another_variant(settings: dict, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Recipe(method="dpo", **settings)
