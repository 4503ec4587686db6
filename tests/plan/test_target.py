"""The target: a named card, a size, or this machine within the limits of its container."""

from pathlib import Path

import psutil
import pytest
import torch

import lite.plan.target
from lite.errors import RecipeError
from lite.plan.cards import CARDS, HOST_FREE
from lite.plan.target import at_hand, free_host_bytes, target
from lite.recipe import Recipe
from lite.sizes import GIB


@pytest.mark.parametrize("vram", ["24GB", "24", "24 GiB"])
def test_a_size_is_a_card_of_that_size(vram: str) -> None:
    where = target(Recipe(model="qwen-14b", vram=vram))
    assert (where.device_type, where.card.name, where.dtype, where.at_hand) == (
        "cuda",
        "rtx-4090",
        torch.bfloat16,
        False,
    )
    assert where.budget_bytes == pytest.approx(22.5 * GIB, rel=1e-6)
    assert where.budget_bytes + where.reserve_bytes == where.memory_bytes == 24 * GIB
    assert any("rtx-4090" in said for said in where.assumptions)


def test_half_a_gib_counts() -> None:
    assert target(Recipe(vram="22.5GiB")).memory_bytes == 22.5 * GIB


def test_a_card_by_name_and_with_another_size() -> None:
    assert target(Recipe(), card="L4").card == CARDS["l4"]
    small = target(Recipe(vram="16GB"), card="l4")
    assert (small.card.name, small.memory_bytes, small.card.bandwidth) == ("l4", 16 * GIB, CARDS["l4"].bandwidth)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, none is assumed")
def test_without_a_gpu_one_is_assumed_and_said() -> None:
    where = target(Recipe())
    assert where.memory_bytes == 24 * GIB
    assert "no GPU here: a card of 24 GB is assumed" in where.assumptions[0]


def test_an_unknown_card_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"--card rtx-409: not known\. Did you mean rtx-4090\? Known: rtx-3060, "):
        target(Recipe(), card="rtx-409")


def test_of_cpu_and_card_one_is_left_out() -> None:
    with pytest.raises(RecipeError, match="device = cpu beside a card"):
        target(Recipe(device="cpu"), card="l4")


def test_on_a_cpu_vram_caps_what_a_run_takes() -> None:
    """`lite plan` and a run mean the same by it, and nothing of what was not asked for is called a reserve."""
    recipe = Recipe(device="cpu", vram="50MB", dtype="float32")
    for where in (target(recipe), at_hand(recipe)):
        assert (where.device_type, where.budget_bytes, where.reserve_bytes) == ("cpu", 50 * 2**20, 0)


def test_a_cpu_leaves_a_share_of_its_free_memory() -> None:
    where = target(Recipe(device="cpu"))
    assert where.budget_bytes == pytest.approx(HOST_FREE * where.memory_bytes)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"memory.max": "max\n", "memory.current": "5\n", "memory.stat": ""}, None),
        ({"memory.max": "1000\n", "memory.current": "600\n", "memory.stat": "anon 300\ninactive_file 0\n"}, 400),
        # Read files are in memory until somebody needs it.
        ({"memory.max": "1000\n", "memory.current": "950\n", "memory.stat": "anon 150\ninactive_file 800\n"}, 850),
        ({"memory.max": "1000\n", "memory.current": "1010\n", "memory.stat": ""}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "1000\n",
                "memory/memory.usage_in_bytes": "500\n",
                "memory/memory.stat": "total_inactive_file 100\n",
            },
            600,
        ),
        # A limit that is none: cgroup v1 writes nearly 2^63.
        (
            {
                "memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
                "memory/memory.usage_in_bytes": "500\n",
                "memory/memory.stat": "",
            },
            None,
        ),
    ],
)
def test_a_container_has_less(
    files: dict[str, str], free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(lite.plan.target, "CGROUP", tmp_path)
    if free is None:
        assert free_host_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.1)
    else:
        assert free_host_bytes() == free
