"""What a run of whole weights takes of a disk is known before it begins."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lite.engine.optimizer import optimizer
from lite.engine.scalars import Scalars
from lite.model import load, trained
from lite.recipe import Recipe
from lite.train import disk
from lite.train.disk import Needed
from tests.tiny import tiny_settings


@pytest.fixture(scope="module")
def full(tiny: Path) -> Callable[..., Recipe]:
    """full(…): a recipe that trains whole weights."""

    def build(**changes: object) -> Recipe:
        settings = tiny_settings(tiny, **{"galore": True, "galore_rank": 8, **changes})
        del settings["lora_r"]
        return Recipe(**settings)

    return build


def tensors(state: Any) -> Iterator[torch.Tensor]:
    """Those that grow with the model: not counts of steps, nor the maps of 256 numbers that bitsandbytes adds."""
    if isinstance(state, torch.Tensor):
        yield state
    if isinstance(state, dict):
        state = [inner for name, inner in state.items() if not str(name).startswith(("step", "qmap"))]
    for inner in state if isinstance(state, list | tuple) else ():
        yield from tensors(inner)
    if hasattr(state, "ortho_matrix"):  # galore-torch's
        yield state.ortho_matrix


def by_adamw(name: str) -> dict[str, object]:
    own = {"galore_rank": 8} if name == "galore-torch" else {"galore_rank": 128}
    return {"galore": False, "full": True, "optimizer": name, **own}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="8-bit states"),
        pytest.param({"galore_states": "float32", "int8_weights": True, "galore_rank": 20}, id="small matrices"),
        pytest.param(
            {"galore_merge": "refresh", "galore_projection": "random", "train_embeddings": True}, id="waiting"
        ),
        pytest.param({"galore_states": "bfloat16", "galore_sketch_steps": 200}, id="sketches summed"),
        pytest.param(by_adamw("adamw"), id="adamw"),
        pytest.param(by_adamw("adamw-8bit"), id="adamw-8bit"),
        pytest.param(by_adamw("galore-torch"), id="galore-torch"),
    ],
)
def test_an_optimizers_state_is_known_to_the_byte(full: Callable, changes: dict[str, object]) -> None:
    recipe = full(**changes)
    model = trained.attach(load.load_model(recipe), recipe)
    expected = disk.optimizer_bytes(recipe, model)
    update = optimizer(model, recipe, Scalars.of(recipe, model.device))
    for _ in range(9):  # beyond the first look for each subspace, after which those to come are gathered for
        model(input_ids=torch.arange(20).view(1, -1)).logits.float().logsumexp(-1).sum().backward()
        update.step()
        update.zero_grad()
    assert sum(tensor.nbytes for tensor in tensors(update.state_dict())) == expected


def test_the_worst_moment_by_hand() -> None:
    """Three of 14 while one is written, or two and a model of 16; each with two copies of 5."""
    figures = {"checkpoint": 14, "reference": 5, "kept": 2, "written": 3, "references": 2}
    assert Needed(model=16, **figures).most == 2 * 14 + 16 + 2 * 5
    assert Needed(model=10, **figures).most == 3 * 14 + 2 * 5


def test_no_more_checkpoints_are_counted_than_there_will_be(full: Callable) -> None:
    """Ten steps with one every three are four, at most three at once; refreshed before steps 5 and 9 are two copies."""
    recipe = full(method="dpo", refresh_reference=4)
    model = trained.attach(load.load_model(recipe), recipe)
    ten, three = disk.needed(recipe, model, 10), disk.needed(recipe, model, 3)
    assert (ten.kept, ten.written, ten.references) == (2, 3, 2)
    assert (three.kept, three.written, three.references) == (1, 1, 0)
    assert ten.model == sum(p.nbytes for p in model.parameters())


def test_what_a_run_has_already_is_room_for_what_comes(
    full: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on replaces its checkpoints, so it needs only what is missing; it is told, and not stopped."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    recipe, said = full(), []
    model = trained.attach(load.load_model(recipe), recipe)
    disk.require_room(recipe, model, 10, tmp_path, note=said.append, go_on=True)
    assert said[1:] == ["it goes on all the same; make room before the next checkpoint"]
    disk.require_room(full(force=True), model, 10, tmp_path, note=said.append, go_on=False)
    assert len(said) == 3
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights").write_bytes(b"w" * disk.needed(recipe, model, 10).most)
    disk.require_room(recipe, model, 10, tmp_path, note=said.append, go_on=False)
    assert len(said) == 4
