"""The static part of a plan, against the arithmetic of QLoRA."""

import pytest
import torch

from lite.errors import ModelError
from lite.memory.meter import frozen_tensors
from lite.model import load
from lite.plan import skeleton
from lite.plan.skeleton import config_of, layers_of
from lite.recipe import Recipe
from lite.sizes import GIB
from tests.plan.conftest import trials_of, wide_recipe


@pytest.mark.parametrize(
    ("model", "blocks", "embedding", "adapters"),
    [("qwen2.5-14b", 6.348, 1.450, 68.81e6), ("qwen3-14b", 6.348, 1.449, 64.23e6)],
)
def test_what_14b_takes_before_a_step(model: str, blocks: float, embedding: float, adapters: float) -> None:
    """GiB. Blocks: 13.212 B weights in NF4, quantised twice: 4.127 bits each. Embedding and head: bf16, Qwen2.5 e.g.
    152,064 · 5,120 · 2 bytes. Adapters, r = 16: of each linear layer its inputs and outputs times 16."""
    trials = trials_of(Recipe(model=model, load_in_4bit=True), 22.5 * GIB)
    static = {name: size / GIB for name, size in trials.static().items()}
    assert static["layers"] == pytest.approx(blocks, rel=0.01)
    assert static["embedding"] == static["head"] == pytest.approx(embedding, rel=0.01)
    assert static["rest"] < 0.001
    few = skeleton.skeleton(trials.recipe, trials.config, torch.bfloat16, layers=1)
    trained = [p for p in few.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert sum(p.numel() for p in trained) * trials.layers == pytest.approx(adapters, rel=0.01)


def test_a_config_alone_is_enough(shaped) -> None:
    """No weights lie in the folder; and none of the skeleton's tensors has memory."""
    recipe = wide_recipe(shaped(5))
    config = config_of(recipe)
    assert layers_of(config) == 5
    model = skeleton.skeleton(recipe, config, torch.bfloat16, layers=1)
    assert {t.device.type for t in [*model.parameters(), *frozen_tensors(model)]} <= {"meta", "cpu"}
    assert sum(t.nbytes for t in frozen_tensors(model) if t.device.type == "cpu") < 4096  # code books
    with pytest.raises(ModelError, match="there are no weights in it"):
        load.config_of(recipe)


def test_a_tied_embedding_is_counted_once(shaped) -> None:
    static = trials_of(wide_recipe(shaped(2, tied=True)), GIB).static()
    assert (static["embedding"], static["head"]) == (32_000 * 1024 * 2, 0)


@pytest.mark.parametrize(("settings", "each"), [({"load_in_4bit": False}, 2), ({"load_in_8bit": True}, 1)])
def test_other_kinds_of_weights(shaped, settings: dict, each: int) -> None:
    """bf16: two bytes. int8: one, and a scale of four for each row. q, o: 1,024²; k, v: 256 · 1,024; MLP: 3 · 4 ·
    1,024². Beside them biases of 1,536 and norms of 2,048 in bf16."""
    recipe = wide_recipe(shaped(2), **{"load_in_4bit": False, **settings})
    matrices = 1024 * (2 * 1024 + 2 * 256 + 3 * 4096)
    rows = 2 * 1024 + 2 * 256 + 2 * 4096 + 1024
    expected = each * matrices + 2 * (1536 + 2048) + (4 * rows if each == 1 else 0)
    assert trials_of(recipe, GIB).static()["layers"] == 2 * expected
