"""Every recipe of the project loads strictly, says what card it is for, and reruns itself."""

from pathlib import Path

import pytest

from lite import recipe as recipes
from lite.model import catalog
from lite.plan.plan import plan

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SIZES = {"7b", "8b", "14b", "32b"}


def test_each_class_of_models_has_one() -> None:
    assert {path.stem.split("-")[1] for path in RECIPES} == SIZES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_loads_and_reruns_itself(path: Path, tmp_path: Path) -> None:
    """Unknown keys and wrong types raise; the name is MODEL-METHOD, -galore; the model's shape is known offline."""
    recipe = recipes.load(path)
    assert path.stem == f"{recipe.model}-{recipe.method}" + ("-galore" if recipe.optimizer == "galore" else "")
    assert catalog.resolve(recipe.model) in {shape.hub for shape in catalog.CATALOG.values()}
    recipe.save(tmp_path / "recipe.yaml")
    assert recipes.load(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_is_short_and_begins_with_its_card(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert 10 <= len(lines) <= 25
    assert lines[0].startswith("# For a card of ")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_weights_take_what_the_comment_says(path: Path) -> None:
    """NF4, quantised twice: 4 bits, an 8-bit scale per 64 weights, a 32-bit one per 256 of those: 4.127 bits.

    Where they are trained, 16 bits; or 8, and a 32-bit scale for every 128.
    """
    recipe = recipes.load(path)
    shape = next(s for s in catalog.CATALOG.values() if s.hub == catalog.resolve(recipe.model))
    quantised = shape.layers * shape.matrix_parameters
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    if recipe.full:
        bits = 8 + 32 / 128 if recipe.int8_weights else 16
    weights_bytes = quantised * bits / 8 + (shape.parameters - quantised) * 2
    stated = float(path.read_text(encoding="utf-8").split("The weights take ")[1].split(" GiB")[0])
    assert abs(weights_bytes / 2**30 - stated) <= 0.06


@pytest.mark.parametrize("name", ["llama-8b-orpo", "qwen-14b-kto", "qwen-14b-orpo-galore"])
def test_fits_the_card_that_it_names(name: str) -> None:
    """By a few layers, of rows as long as may be; of the largest model and of a loss that needs more than pairs."""
    path = ROOT / "recipes" / f"{name}.yaml"
    gigabytes = path.read_text(encoding="utf-8").split("# For a card of ")[1].split(" GB")[0]
    recipe = recipes.load(path).model_copy(update={"vram": f"{gigabytes}GB", "batch_size": 1})
    made = plan(recipe, quick=True, longest=False, advise=False)
    assert made.fits, made.tried
