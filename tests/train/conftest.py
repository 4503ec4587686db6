"""The tiny world of tests/tiny.py, and recipes for it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lite.recipe import Recipe
from tests.tiny import tiny_settings, write_world


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and its pairs."""
    return write_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def recipe(tiny: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """recipe(save_steps=…): a recipe whose run goes to `tmp_path / "run"`."""

    def build(**changes: object) -> Recipe:
        return Recipe(**tiny_settings(tiny, **{"output_dir": str(tmp_path / "run"), **changes}))

    return build
