"""A profile of the tiny world: what it measured adds up, and what it left can be read."""

import json
import math
from pathlib import Path

import pytest

from lite.data.batches import plan_batches
from lite.data.packing import pack_sizes
from lite.data.packs import Layout
from lite.errors import RecipeError
from lite.profile import Profile, profile
from lite.recipe import Recipe
from lite.train.progress import Quiet
from lite.train.work import read
from tests.tiny import tiny_settings, write_world


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    recipe = Recipe(**tiny_settings(tiny, tokens_per_pack=200))
    return profile(recipe, steps=2, folder=tmp_path_factory.mktemp("profile"))


def test_times_add_up(measured: Profile) -> None:
    result = measured.result
    assert list(result["phases"]) == ["data", "transfers", "forward", "head", "backward", "idle", "update"]
    assert len(result["each"]) == result["steps"] == 2
    for one in result["each"]:
        assert math.isclose(sum(one["phases"].values()), one["seconds"], rel_tol=1e-6)
    assert math.isclose(sum(result["phases"].values()), result["seconds"], rel_tol=1e-6)  # a median of two is a mean
    assert result["tokens_per_second"] > 0


def test_parts_add_up_to_the_peak(measured: Profile) -> None:
    result, parts = measured.result, measured.parts
    assert sum(result["parts"].values()) == result["peak_bytes"]
    assert max(map(sum, zip(*parts.values(), strict=True))) == result["peak_bytes"] == max(result["peaks"].values())
    assert {"weights", "adapters", "optimizer", "gradients", "forward", "logits", "backward"} <= parts.keys()
    # 32-bit weights of the tiny model, and of each adapter's weight two more in Adam's states.
    assert len({*parts["weights"]}) == len({*parts["adapters"]}) == 1
    assert 2 * parts["adapters"][0] <= parts["optimizer"][0] < 2.1 * parts["adapters"][0]
    assert parts["gradients"][0] == 0
    assert max(parts["gradients"]) == parts["adapters"][0]
    assert [name for _, name in measured.phases][:3] == ["forward", "head", "backward"]


def test_what_it_leaves(measured: Profile) -> None:
    folder = measured.folder
    assert json.loads((folder / "profile.json").read_text(encoding="utf-8")) == measured.result
    left = json.loads((folder / "timeline.json").read_text(encoding="utf-8"))
    assert left["parts"] == measured.parts
    assert left["operators"] >= len(left["parts"]["weights"])
    assert measured.result["recipe"]["tokens_per_pack"] == 200
    assert measured.result["process_bytes"] > 50e6


def test_prove_takes_the_largest_pack_of_the_run(tiny: Path, tmp_path: Path) -> None:
    """Two epochs, differently shuffled: it is that of the one step which has it."""
    recipe = Recipe(**tiny_settings(tiny, tokens_per_pack=300))
    layout = Layout(("chosen", "rejected"), tokens_per_pack=300)
    _, data = read(recipe, Quiet())
    sizes = []
    for epoch in range(2):
        members = plan_batches(data.train, layout, batch_size=4, seed=recipe.seed, epoch=epoch).members
        sizes += [max(pack_sizes([data.train[i] for i in one], layout)) for one in members]
    assert len(sizes) == 10
    assert max(sizes) > max(sizes[:2])
    result = profile(recipe, steps=1, prove=True, folder=tmp_path / "proved").result
    assert result["largest_pack_tokens"] == max(sizes)
    assert result["proved"]


def test_it_reads_no_more_of_a_reference_than_it_needs(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two steps of four rows out of twenty; none that is held out."""

    recipe = Recipe(**tiny_settings(tiny, method="dpo", cache=str(tmp_path / "cache")))
    with caplog.at_level("INFO", logger="lite"):
        profile(recipe, steps=1, folder=tmp_path / "p")
    assert "reference: 8 rows computed" in caplog.text


def test_what_it_refuses(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--steps 0: expected at least 1"):
        profile(Recipe(**tiny_settings(tiny)), steps=0)
    with pytest.raises(RecipeError, match="A profile goes where --output says"):
        profile(Recipe(**tiny_settings(tiny, output_dir=str(tmp_path / "run"))))
