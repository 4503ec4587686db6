"""The tiny world, and settings of runs in it that keep their cache to themselves."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lite.recipe import Recipe
from tests.tiny import tiny_settings, write_world


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model, its pairs and held-out rows."""
    return write_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """recipe(method=…): four steps, an evaluation after two, the cache beside the run."""

    def build(**changes: object) -> Recipe:
        folders = {"output_dir": str(tmp_path / "run"), "cache": str(tmp_path / "cache")}
        settings = {"max_steps": 4, "save_steps": 2, "samples": 0, **folders, **changes}
        return Recipe(**tiny_settings(tiny, **settings))

    return build
