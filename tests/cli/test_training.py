"""From what was typed to the recipe: defaults, then the file, then the flags that were given."""

from pathlib import Path

import pytest

from lite import signatures
from lite.cli import options, training
from lite.errors import RecipeError
from lite.recipe import Recipe, read_yaml


def composed(method: str, line: str) -> Recipe:
    """The recipe that a command line means."""
    recipe, _ = training.understood(method, line.split())
    return recipe


def test_flags_override_the_file_which_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("method: orpo\nlora_r: 8\nlearning_rate: 1e-5\nbeta: 0.3\nsplit_pairs: false\n")
    recipe = composed("orpo", f"--recipe {file} --lora-r 4")
    assert (recipe.lora_r, recipe.learning_rate, recipe.hyperparameters["beta"]) == (4, 1e-5, 0.3)
    assert recipe.split_pairs is False
    assert recipe.batch_size == Recipe().batch_size


def test_a_flag_at_its_default_still_overrides_the_file(tmp_path: Path) -> None:
    """What was typed counts, not whether it differs from the default."""
    file = tmp_path / "r.yaml"
    file.write_text("lora_r: 8\nload_in_4bit: true\nbeta: 0.3\nself_check: false\n")
    recipe = composed("orpo", f"--recipe {file} --lora-r 16 --no-4bit --beta 0.1 --self-check")
    assert (recipe.lora_r, recipe.load_in_4bit, recipe.hyperparameters["beta"], recipe.self_check) == (
        16,
        False,
        0.1,
        True,
    )


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("--4bit", "load_in_4bit", True),
        ("--load-in-4bit", "load_in_4bit", True),
        ("--8bit", "load_in_8bit", True),
        ("--no-load-in-8bit", "load_in_8bit", False),
        ("--learning-rate 1e-5", "learning_rate", 1e-5),
        ("--lora-alpha 8", "lora_alpha", 8.0),
        ("--max-steps=3", "max_steps", 3),
        ("--data -", "data", "-"),
        ("--columns prompt=question,chosen=good", "columns", {"prompt": "question", "chosen": "good"}),
        ("--no-offload-checkpoints", "offload_checkpoints", False),
        ("--dtype float32", "dtype", "float32"),
        ("--nll-over sequence", "nll_over", "sequence"),
        ("--model 7", "model", "7"),
    ],
)
def test_what_a_flag_means(line: str, key: str, value: object) -> None:
    assert composed("orpo", line).resolved()[key] == value


@pytest.mark.parametrize(
    ("line", "full", "optimizer"),
    [
        ("--galore", True, "galore"),
        ("--no-galore", False, "adamw"),
        ("--full --optimizer galore", True, "galore"),
        ("--full", True, "adamw"),
    ],
)
def test_full_training_is_asked_for_by_one_flag_or_two(line: str, full: bool, optimizer: str) -> None:
    recipe = composed("orpo", line)
    assert (recipe.full, recipe.optimizer) == (full, optimizer)
    assert composed("orpo", "--no-galore") == composed("orpo", "")


def test_a_flag_overrides_a_saved_recipe_through_a_shorthand(tmp_path: Path) -> None:
    """The saved one names every setting, `full: false` and `optimizer: adamw` among them."""
    file = tmp_path / "recipe.yaml"
    Recipe(data="x").save(file)
    assert composed("orpo", f"--recipe {file} --galore").optimizer == "galore"
    Recipe(data="x", galore=True).save(file)
    assert composed("orpo", f"--recipe {file} --optimizer adamw-8bit").full is True
    with pytest.raises(RecipeError, match="--galore = False beside full = True and optimizer = galore"):
        composed("orpo", f"--recipe {file} --no-galore")


def test_what_is_said_again_means_the_same() -> None:
    line = "--data x --galore --galore-rank 4 --galore-merge refresh --int8-weights --vector-learning-rate 1e-4"
    recipe = composed("orpo", line)
    keys = Recipe.model_fields.keys() - {"method"}
    for said in (options.again, options.otherwise):
        assert composed("orpo", " ".join(said(recipe, keys))) == recipe


def test_every_setting_has_a_flag_and_every_flag_a_setting() -> None:
    for signature in signatures.registered().values():
        settings = list(options.settings(signature))
        keys = [setting.key for setting in settings]
        assert keys.index("galore") == keys.index("full") - 1  # a shorthand before what it stands for
        fields = [key for key in keys if key != "galore"]
        assert fields == [*signature.hyperparameters, *(key for key in Recipe.model_fields if key != "method")]
        flags = [flag for setting in [*settings, *options.OWN] for flag in setting.flags]
        assert len(set(flags)) == len(flags)
        assert all(f"--{key.replace('_', '-')}" in flags for key in keys)


def test_the_bundled_example_is_said_and_used(capsys: pytest.CaptureFixture[str]) -> None:
    """Only where neither model, data, adapter nor file is named; other flags override its settings."""
    bundled = composed("orpo", "--lora-r 3")
    assert "no --model, no --data: the bundled example, settings from" in capsys.readouterr().err
    assert (bundled.lora_r, bundled.model, bundled.data) == (3, "bundled", "bundled")
    assert bundled.batch_size == read_yaml(training.BUNDLED_RECIPE)["batch_size"]
    for line in ("--data pairs.jsonl", "--model qwen-14b", "--adapter there", "--run runs/x"):
        assert composed("orpo", line).batch_size == Recipe().batch_size
    assert capsys.readouterr().err == ""


def test_json_is_no_setting_of_the_run() -> None:
    assert training.understood("orpo", ["--json", "--data", "x"])[1] is True
    assert training.understood("orpo", ["--data", "x"]) == (Recipe(data="x"), False)
