"""A run on CUDA that was stopped and resumed comes to what it would have come to. On the CPU the test tries itself."""

import shutil
from collections.abc import Callable

import pytest
from safetensors.torch import load_file

from lite.train import Run, checkpoints, resume, train

GPU = pytest.mark.gpu
CASES = [
    pytest.param("cpu", "float32", {}, id="cpu", marks=pytest.mark.nightly),  # tries the test itself
    pytest.param("cuda", "bfloat16", {"optimizer": "adamw-8bit"}, marks=GPU, id="8-bit states"),
    pytest.param("cuda", "bfloat16", {"recompute_layers": 2, "offload_checkpoints": True}, marks=GPU, id="offloaded"),
]


def stopped_after_three(run: Run) -> None:
    """As if it had ended there: no result, no adapter, no later checkpoint."""
    (run.folder / "result.json").unlink()
    shutil.rmtree(run.adapter)
    checkpoints.keep_until(run.folder / "checkpoints", 3)


@pytest.mark.parametrize(("device", "dtype", "settings"), CASES)
def test_bit_for_bit_with_attention_that_repeats_itself(recipe: Callable, device: str, dtype: str, settings: dict):
    """Eager attention: flash attention's backward adds up in an order that no two runs share."""
    run = train(
        recipe(device=device, dtype=dtype, attn_implementation="eager", samples=0, num_train_epochs=1, **settings)
    )
    adapter, metrics = load_file(run.adapter / "adapter_model.safetensors"), run.metrics
    stopped_after_three(run)
    again = resume(run.folder)
    assert again.metrics == metrics
    found = load_file(again.adapter / "adapter_model.safetensors")
    assert found.keys() == adapter.keys()
    assert all(bool((found[name] == adapter[name]).all()) for name in adapter)


@pytest.mark.gpu
def test_within_what_flash_attention_leaves_open(recipe: Callable):
    """By the kernels that `auto` takes: the same steps, the same losses to a percent."""
    run = train(recipe(device="cuda", dtype="bfloat16", samples=0, num_train_epochs=1))
    losses = [line["loss"] for line in run.metrics if "loss" in line]
    stopped_after_three(run)
    again = resume(run.folder)
    assert [line["loss"] for line in again.metrics if "loss" in line] == pytest.approx(losses, rel=0.01)
    assert again.result["steps"] == run.result["steps"] == 5
