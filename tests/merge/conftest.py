"""Finished runs in the tiny world: LoRA on fp32 weights, and on the same in four bits."""

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lite
from lite.recipe import Recipe
from tests.tiny import tiny_settings, write_world


@pytest.fixture(scope="session", autouse=True)
def quick_collector() -> Iterator[None]:
    """As in `lite`: what packages made when they were imported is not looked through whenever a model is let go."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and its pairs."""
    return write_world(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """trained(load_in_4bit=True): the folder of a run of two steps, made once for each; only to be read."""
    made: dict[str, Path] = {}

    def run(**changes: object) -> Path:
        if (key := repr(sorted(changes.items()))) not in made:
            folder = tmp_path_factory.mktemp("runs") / "run"
            own = {"max_steps": 2, "samples": 0, "output_dir": str(folder), **changes}
            made[key] = lite.train(Recipe(**tiny_settings(tiny, **own))).folder
        return made[key]

    return run


@pytest.fixture
def run(trained: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the fp32 run, to be changed."""
    return shutil.copytree(trained(), tmp_path / "run")
