"""The recipe: what it takes, what it refuses and how it says so, and that a saved one is the same one."""

from pathlib import Path

import pytest

from lite import recipe as recipes
from lite.errors import RecipeError
from lite.recipe import Recipe


def refusal(**values: object) -> str:
    """The message with which a recipe of these values is refused."""
    with pytest.raises(RecipeError) as caught:
        Recipe(**values)
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E-5", 1e-5), ("1.5e-5", 1.5e-5), ("2e-05", 2e-5), ("1", 1.0)]
)
def test_numbers_in_yaml_are_numbers(text: str, value: float, tmp_path: Path) -> None:
    assert recipes.load(written(tmp_path, f"learning_rate: {text}")).learning_rate == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("load_in_4bit: yes", "load_in_4bit = 'yes': expected true or false."),
        ("load_in_4bit: 1", "load_in_4bit = 1: expected true or false."),
        ("lora_r: '16'", "lora_r = '16': expected a whole number, at least 1."),
        ("lora_r: 16.0", "lora_r = 16.0: expected a whole number, at least 1."),
        ("lora_r: true", "lora_r = True: expected a whole number, at least 1."),
        ("lora_dropout: 1", "lora_dropout = 1: expected a number, at least 0, below 1."),
        ("seed: 4294967296", "seed = 4294967296: expected a whole number, at least 0, below 4294967296."),
        ("learning_rate: 0", "learning_rate = 0: expected a number, above 0."),
        ("learning_rate: .nan", "learning_rate = nan: expected a number, above 0."),
        ("dtype: fp16", "dtype = 'fp16': expected one of auto, bfloat16, float32."),
        ("revision: 1234567", "revision = 1234567: expected text."),
        ("columns: {prompt: 1}", "expected pairs such as prompt=question (in a recipe, `prompt: question`)."),
        ("beta: big", "beta = 'big': expected a number, at least 0."),
        ("nll_over: prompt", "nll_over = 'prompt': expected one of completion, sequence."),
    ],
)
def test_a_value_of_the_wrong_type_or_range(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.load(written(tmp_path, text))
    assert problem in str(caught.value)


def test_yaml_words_stay_words(tmp_path: Path) -> None:
    """YAML 1.1 would make a boolean of `no`, a date of the revision, and numbers of 1:30 (90) and 012 (10)."""
    recipe = recipes.load(written(tmp_path, "columns: {prompt: no}\nrevision: 2024-01-01\nmodel: 1:30\ndata: 012"))
    assert recipe.columns == {"prompt": "no"}
    assert (recipe.model, recipe.data) == ("1:30", "012")
    assert recipe.revision == "2024-01-01"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 1\nseed: 2", "seed is there twice"),
        ("lora-r: 1\nlora_r: 2", "with a dash and with an underscore"),
        ("- seed", "expected `key: value` lines, found list"),
        ("seed: [", "not YAML"),
    ],
)
def test_a_file_that_is_no_recipe(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.load(written(tmp_path, text))
    assert problem in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml: No such file"):
        recipes.load(tmp_path / "absent.yaml")


def test_comments_alone_are_a_recipe(tmp_path: Path) -> None:
    assert recipes.load(written(tmp_path, "# all defaults\n")) == Recipe()


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("bata", "Did you mean beta?"),
        ("dta", "Did you mean data?"),
        ("lerning_rate", "Did you mean learning_rate?"),
        ("max_step", "Did you mean max_steps?"),
        ("lora_rank", "lite calls it lora_r: Rank of the adapter."),
        ("pref_beta", "lite calls it beta."),
        ("use_galore", "lite calls it galore: Short for --full --optimizer galore"),
        ("finetuning_type", "with --full, or --galore, every weight"),
        ("galore_layerwise", "each gradient is projected as it arises"),
        ("galor", "Did you mean galore?"),
        ("gradient_accumulation_steps", "lite calls it batch_size: Examples per optimizer step"),
        ("zzz", "See `lite orpo --help`."),
    ],
)
def test_an_unknown_key_says_what_was_meant(key: str, meant: str) -> None:
    message = refusal(**{key: 1})
    assert f"{key}: no such setting of orpo." in message
    assert meant in message


def test_a_foreign_name_is_suggested_only_where_it_exists() -> None:
    """SFT has no beta, so it must not be sent there."""
    assert "lite calls it" not in refusal(method="sft", pref_beta=1)


def test_all_problems_are_told_at_once() -> None:
    message = refusal(lora_r=0, dtype="x", bata=1, beta="x", load_in_4bit=True, load_in_8bit=True, adapter="a", run="b")
    for name in ("lora_r = 0", "dtype = 'x'", "bata:", "beta = 'x'", "load_in_8bit", "adapter beside run"):
        assert name in message


def test_an_unknown_method_lists_those_there_are() -> None:
    message = refusal(method="orp")
    assert "Did you mean orpo?" in message
    assert "orpo, sft, simpo, cpo" in message


def test_a_hyperparameter_of_another_loss_is_unknown() -> None:
    assert "gamma: no such setting of orpo" in refusal(gamma=1.0)
    assert Recipe(method="simpo", gamma=1.0).hyperparameters == {"beta": 2.0, "gamma": 1.0}


def test_problems_are_what_the_recipe_would_raise() -> None:
    values = {"lora_r": 0, "bata": 1, "load_in_4bit": True, "load_in_8bit": True}
    message = refusal(**values)
    found = recipes.problems(values)
    assert len(found) == 3
    assert all(problem.key + problem.text in message for problem in found)
    assert recipes.problems({}) == []


@pytest.mark.parametrize("commit", ["12345e6", "0012345", "1234567", "null", "1.5e3"])
def test_a_commit_that_looks_like_a_number_is_saved_as_text(commit: str, tmp_path: Path) -> None:
    Recipe(revision=commit).save(tmp_path / "recipe.yaml")
    assert recipes.load(tmp_path / "recipe.yaml").revision == commit


def test_a_saved_recipe_is_the_same_recipe(tmp_path: Path) -> None:
    """Defaults included: what a run saves reruns it under a later lite whose defaults differ."""
    recipe = Recipe(method="simpo", data=Path("a") / "ü.jsonl", columns={"prompt": "no"}, adam_epsilon=1e-9, gamma=0.5)
    recipe.save(tmp_path / "recipe.yaml")
    loaded = recipes.load(tmp_path / "recipe.yaml")
    assert loaded == recipe
    assert loaded.data == str(Path("a") / "ü.jsonl")
    assert recipes.read_yaml(tmp_path / "recipe.yaml").keys() == {*Recipe.model_fields, "beta", "gamma"}
    assert loaded != Recipe(method="simpo")


def test_the_learning_rate_is_the_losss_own_unless_set() -> None:
    assert Recipe(method="sft").peak_learning_rate == 2e-4
    assert Recipe(method="sft", learning_rate=1e-6).peak_learning_rate == 1e-6


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 5e-5),
        ({"full": True}, 5e-6),
        ({"full": True, "optimizer": "paged-adamw-8bit"}, 5e-6),
        ({"full": True, "optimizer": "galore-torch"}, 5e-5),
        ({"galore": True}, 5e-5),
        ({"full": True, "learning_rate": 1e-4}, 1e-4),
    ],
    ids=str,
)
def test_full_training_takes_a_tenth_of_an_adapters_rate(settings: dict, rate: float) -> None:
    """orpo's own is 5e-5, for adapters; GaLore's updates are scaled already."""
    assert Recipe(method="orpo", **settings).peak_learning_rate == pytest.approx(rate, rel=1e-12)


def test_vectors_move_as_fast_as_what_is_projected_back() -> None:
    """1e-3 × 0.5, unless set."""
    assert Recipe(galore=True, learning_rate=1e-3, galore_scale=0.5).peak_vector_learning_rate == 5e-4
    assert Recipe(galore=True, learning_rate=1e-3, vector_learning_rate=1e-5).peak_vector_learning_rate == 1e-5


def test_a_shorthand_is_what_it_stands_for_and_is_not_stored(tmp_path: Path) -> None:
    recipe = recipes.load(written(tmp_path, "galore: true\ngalore_rank: 4"))
    assert recipe == Recipe(full=True, optimizer="galore", galore_rank=4)
    assert {"full", "optimizer"} <= recipe.model_fields_set
    assert Recipe(galore=False) == Recipe()
    recipe.save(tmp_path / "recipe.yaml")
    assert "galore" not in recipes.read_yaml(tmp_path / "recipe.yaml")
    assert recipes.load(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("file", "above", "full", "optimizer"),
    [
        ("full: false\noptimizer: adamw", {"galore": True}, True, "galore"),
        ("galore: true", {"optimizer": "adamw-8bit"}, True, "adamw-8bit"),
        ("galore: true", {"galore": False}, False, "adamw"),
        ("galore: true", {"full": False, "optimizer": "adamw"}, False, "adamw"),
        ("galore: true\noptimizer: galore", {"optimizer": "adamw"}, True, "adamw"),
    ],
)
def test_what_is_given_overrides_the_file_through_a_shorthand(
    file: str, above: dict, full: bool, optimizer: str, tmp_path: Path
) -> None:
    recipe = recipes.load(written(tmp_path, file), **above)
    assert (recipe.full, recipe.optimizer) == (full, optimizer)


def test_a_file_that_contradicts_itself_is_refused_though_a_part_is_overridden(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="full = False beside galore"):
        recipes.load(written(tmp_path, "galore: true\nfull: false"), optimizer="adamw")


def test_every_setting_can_be_shown() -> None:
    """A help line, a panel, and words for what is expected."""
    for name, field in Recipe.model_fields.items():
        assert field.description, name
        assert field.json_schema_extra["panel"], name
        assert recipes.expected(field), name


def test_a_warm_up_of_a_constant_rate_is_refused(tmp_path: Path) -> None:
    """transformers would leave it out without a word; the default gives way, so that a saved recipe reruns."""
    with pytest.raises(RecipeError, match=r"warmup_ratio = 0\.2: the constant schedule has no warm-up"):
        Recipe(lr_scheduler_type="constant", warmup_ratio=0.2)
    recipe = Recipe(lr_scheduler_type="constant")
    assert recipe.resolved()["warmup_ratio"] == 0
    recipe.save(tmp_path / "recipe.yaml")
    assert recipes.load(tmp_path / "recipe.yaml") == recipe
