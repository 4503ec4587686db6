"""Settings of the reference and of full training that leave each other, or the loss, without meaning."""

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


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train_embeddings": True}, "train_embeddings = True without full: .* Give --galore, or --full."),
        ({"galore_rank": 8}, "galore_rank = 8 without full: .* Give --galore."),
        ({"vector_learning_rate": 1e-5}, "vector_learning_rate = 1e-05 without full"),
        ({"int8_weights": True}, "int8_weights = True without full"),
        ({"optimizer": "galore"}, "optimizer = 'galore' without full: .* Give --full, or --galore for both."),
        ({"optimizer": "galore-torch"}, "optimizer = 'galore-torch' without full: .* Give --full.$"),
        ({"full": True, "int8_weights": True}, "int8_weights = True beside optimizer = adamw"),
        ({"full": True, "optimizer": "adamw-8bit", "galore_rank": 8}, "galore_rank = 8 beside optimizer = adamw-8bit"),
        ({"full": True, "optimizer": "galore-torch", "galore_states": "float32"}, "galore_states = 'float32' beside"),
        ({"full": True, "vector_learning_rate": 0.1}, "vector_learning_rate = 0.1 beside optimizer = adamw"),
        ({"galore": True, "galore_projection": "svd", "galore_sketch_steps": 4}, "only a sketch sums steps"),
        ({"galore": True, "galore_update_interval": 2, "galore_sketch_steps": 4}, "Take at most 2."),
        ({"galore": True, "galore_projection": "random", "galore_adaptive": True}, "galore_adaptive = True beside"),
        ({"full": True, "load_in_4bit": True}, "load_in_4bit = True beside full: .* --galore --int8-weights"),
        ({"galore": True, "load_in_8bit": True}, "load_in_8bit = True beside galore"),
        ({"full": True, "adapter": "a"}, "adapter = 'a' beside full: .* lite merge a -o MODEL, then --model MODEL"),
        ({"full": True, "run": "runs/x"}, "run = 'runs/x' beside full: .* --model runs/x/model"),
        ({"full": True, "lora_r": 8}, "lora_r = 8 beside full: there is no adapter"),
        ({"full": True, "dtype": "bfloat16"}, "dtype = 'bfloat16' beside full with optimizer = adamw.*--dtype float32"),
        ({"full": True, "optimizer": "galore-torch", "dtype": "bfloat16"}, "with optimizer = galore-torch"),
        ({"full": True, "use_dora": True}, "use_dora = True beside full"),
        ({"full": True, "lora_dropout": 0.1}, "lora_dropout = 0.1 beside full"),
        ({"full": True, "layers_on_host": 2}, "layers_on_host = 2 beside full"),
        ({"galore": True, "int8_weights": True, "keep_weights": True}, "keep_weights = True beside galore"),
        ({"galore": True, "train_embeddings": True, "embedding_on_host": True}, "embedding_on_host = True beside"),
        ({"galore": True, "optimizer": "adamw"}, "optimizer = 'adamw' beside galore, which stands for"),
        ({"galore": True, "full": False}, "full = False beside galore, which stands for"),
        ({"galore": False, "full": True, "optimizer": "galore"}, "galore = False beside full = True"),
        ({"galore": "yes"}, "galore = 'yes': expected true or false."),
    ],
    ids=str,
)  # fmt: skip
def test_what_excludes_each_other_in_full_training(settings: dict, told: str) -> None:
    with pytest.raises(RecipeError, match=told) as caught:
        Recipe(**settings)
    assert len(str(caught.value).splitlines()) == 2  # the headline, and one problem told once


@pytest.mark.parametrize(
    "settings",
    [
        {"galore": True, "optimizer": "galore", "full": True},
        {"galore": True, "int8_weights": True, "galore_merge": "refresh", "vector_learning_rate": 1e-5},
        {"galore": True, "train_embeddings": True, "galore_projection": "random", "galore_states": "float32"},
        {"galore": True, "galore_sketch_steps": 4, "galore_adaptive": True, "galore_update_interval": 4},
        {"galore": True, "galore_update_interval": 1, "dtype": "bfloat16"},
        {"galore": True, "lora_r": 16, "use_dora": False, "layers_on_host": 0, "embedding_on_host": True},
        {"full": True, "optimizer": "galore-torch", "galore_rank": 8, "galore_scale": 1.0, "galore_update_interval": 5},
        {"full": True, "train_embeddings": True, "method": "dpo", "ref": "other", "ref_load_in_4bit": True},
        {"full": False, "galore_rank": 128, "lora_r": 8, "load_in_4bit": True, "layers_on_host": 2},
    ],
    ids=str,
)  # fmt: skip
def test_what_goes_together_in_full_training(settings: dict) -> None:
    assert Recipe(**settings).full is (settings.get("full") is not False)
