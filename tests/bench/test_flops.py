"""The arithmetic of a step's floor, against figures worked out elsewhere and against itself."""

import pytest

from bench.on_card.flops import work
from lite.model.catalog import CATALOG

QWEN = CATALOG["qwen2.5-14b"]


@pytest.mark.parametrize(
    ("model", "size", "shared", "again", "teraflops"),
    [
        ("qwen2.5-14b", (512, 512), False, 1, 172.9),
        ("qwen3-14b", (512, 512), False, 1, 172.0),
        ("qwen2.5-14b", (512, 512), True, 1, 131.5),
        ("qwen2.5-14b", (512, 512), False, 0, 117.5),
        ("qwen2.5-14b", (512, 512), True, 0, 89.7),
        ("qwen2.5-14b", (768, 256), False, 1, 170.5),
        ("qwen2.5-14b", (768, 256), True, 1, 107.9),
        ("qwen2.5-14b", (1024, 1024), False, 1, 355.1),
        ("qwen2.5-14b", (1024, 1024), True, 1, 271.0),
    ],
)
def test_pairs_of_14b(model: str, size: tuple[int, int], shared: bool, again: int, teraflops: float):
    """A pair of two completions alike. Those figures count three products in the head, one of them a recomputation,
    and a whole forward for the layers'."""
    prompt, completion = size
    found = work(CATALOG[model], prompt, (completion, completion), shared=shared)
    assert (found.total(again, last_again=True) + found.head) / 1e12 == pytest.approx(teraflops, rel=0.001)


def test_what_is_not_computed_again_is_not_counted():
    """48 layers, 1,536 tokens: down_proj is 2 · 5,120 · 13,824 operations a token and layer; attention forward is
    2 · 5,120 · (512² + 2 (1,024² − 512²)) a layer."""
    found = work(QWEN, 512, (512, 512))
    whole = found.total(1.0, last_again=True)
    down = 48 * 1536 * 2 * 5120 * 13824
    attention = 48 * 2 * 5120 * (512**2 + 2 * (1024**2 - 512**2))
    assert whole - found.total(1.0) == pytest.approx(down)
    assert whole - found.total(1.0, keep_attention=True) == pytest.approx(down + attention)
    assert found.total(0.5) == pytest.approx((found.total(0.0) + found.total(1.0)) / 2)


def test_unlike_completions_padded_are_rows_of_the_longer():
    """Padded, (100, 20) is two rows of the longer: as (100, 100); shared, its own 150 tokens."""
    assert work(QWEN, 30, (100, 20), shared=False, scored=1) == work(QWEN, 30, (100, 100), shared=False, scored=1)
    one, other = work(QWEN, 30, (100, 20)), work(QWEN, 30, (100, 100))
    assert (other.last / one.last) == pytest.approx(230 / 150)
