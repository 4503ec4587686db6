"""Cost: operations, bytes and seconds of a step, counted by hand."""

from dataclasses import replace

import pytest
import torch

from lite.data.examples import Place, TokenExample
from lite.data.packing import lay_out
from lite.data.packs import Layout
from lite.memory.levers import Levers
from lite.model import catalog
from lite.plan import lengths
from lite.plan.cards import Card
from lite.plan.cost import Cost, visible_pairs
from lite.plan.lengths import Lengths, Row
from lite.plan.trials import Settings
from lite.recipe import Recipe
from lite.sizes import GIB
from tests.plan.conftest import trials_of, wide_recipe

CARD = Card("by hand", GIB, operations=1000.0, bandwidth=100.0, pcie=10.0, efficiency=0.5, launch_s=0.25)
PAIR = TokenExample((1,) * 3, ((1,) * 2, (1,) * 4), Place("pairs.jsonl", 1))
PAIRS = Layout(("chosen", "rejected"))


def brute(pack) -> int:
    """Of each query its own branch so far and all ancestors, one by one."""
    total = 0
    for branch in pack.branches:
        above, parent = 0, branch.parent
        while parent >= 0:
            above += pack.branches[parent].end - pack.branches[parent].start
            parent = pack.branches[parent].parent
        total += sum(above + own + 1 for own in range(branch.end - branch.start))
    return total


def test_visible_pairs_by_hand() -> None:
    """Prompt of 3: 1 + 2 + 3 = 6. Chosen of 2 sees 3 and itself: 4 + 5 = 9. Rejected of 4: 4 + 5 + 6 + 7 = 22. Apart,
    each with a prompt of its own, it would be 15 + 28 = 43."""
    [pack] = lay_out([PAIR], PAIRS).packs
    assert visible_pairs(pack) == brute(pack) == 6 + 9 + 22
    two = lay_out([PAIR, PAIR], PAIRS).packs[0]
    assert visible_pairs(two) == brute(two) == 2 * 37


def test_padded_rows_are_computed_whole() -> None:
    """Two rows of 7: 28 each."""
    [pack] = lay_out([PAIR], Layout(("chosen", "rejected"), padded=True)).packs
    assert visible_pairs(pack) == 2 * 28


def seen(name: str, *args, out, host: bool = False, pairs: int = 0) -> Cost:
    cost = Cost(CARD, pairs)
    tensors = [a for a in args if isinstance(a, torch.Tensor)] + [out]
    cost.see("forward", name, args, out, tensors=tensors, host=host)
    return cost


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    ("name", "args", "out", "operations"),
    [
        ("aten::mm", (meta(3, 5), meta(5, 7)), meta(3, 7), 2 * 3 * 5 * 7),
        ("aten::mm.out", (meta(3, 5), meta(5, 7)), meta(3, 7), 2 * 3 * 5 * 7),
        ("aten::addmm", (meta(7), meta(3, 5), meta(5, 7)), meta(3, 7), 2 * 3 * 5 * 7),
        ("aten::bmm", (meta(2, 3, 5), meta(2, 5, 7)), meta(2, 3, 7), 2 * 2 * 3 * 5 * 7),
        ("aten::linear", (meta(3, 5), meta(7, 5)), meta(3, 7), 2 * 3 * 5 * 7),
        ("aten::add.Tensor", (meta(3, 5), meta(3, 5)), meta(3, 5), 0),
    ],
)
def test_products_by_hand(name: str, args: tuple, out: torch.Tensor, operations: int) -> None:
    assert seen(name, *args, out=out).operations == operations


def test_attention_by_hand() -> None:
    """37 pairs, two heads of 8: q · k and weights · v, 2 · 16 operations a pair each; five products in backward."""
    query, key = meta(9, 2, 8), meta(12, 1, 8)
    assert seen("torch_attn::_varlen_attn", query, key, key, out=query, pairs=37).operations == 2 * 2 * 37 * 16
    back = seen("torch_attn::_varlen_attn_backward", query, query, key, key, out=query, pairs=37)
    assert back.operations == 5 * 2 * 37 * 16


def test_an_operator_takes_the_longer_of_two() -> None:
    """1,000 operations/s at half efficiency, 100 bytes/s. (10, 10) by (10, 10): 2,000 operations in 4 s, 1,200 bytes in
    12 s. (1, 1000) by (1000, 1): 2,000 operations in 4 s, 8,004 bytes in 80.04 s. A sum: 36 bytes, 0.36 s."""
    product = seen("aten::mm", meta(10, 10), meta(10, 10), out=meta(10, 10))
    assert product.seconds["forward"] == pytest.approx(12)
    assert seen("aten::mm", meta(1, 1000), meta(1000, 1), out=meta(1, 1)).seconds["forward"] == pytest.approx(80.04)
    assert seen("aten::add.Tensor", meta(3), meta(3), out=meta(3)).seconds["forward"] == pytest.approx(0.36)


def test_starting_operators_takes_time_of_its_own() -> None:
    """Three sums of one number, 0.12 s each, and 0.25 s to start each: 0.75 s side by side, else 1.11."""
    for overlaps, seconds in ((True, 0.75), (False, 0.75 + 0.36)):
        cost = Cost(replace(CARD, overlaps=overlaps), 0)
        for _ in range(3):
            cost.see("forward", "aten::add.Tensor", (meta(1), meta(1)), meta(1), tensors=[meta(1)] * 3, host=False)
        assert cost.step_seconds() == pytest.approx(seconds)


def test_views_and_empty_tensors_cost_nothing() -> None:
    whole = meta(100)
    assert not seen("aten::view", whole, out=whole[:50]).seconds
    assert not seen("aten::empty", out=whole).seconds
    # What is read once costs once, however often it is repeated.
    assert seen("aten::add.Tensor", meta(1, 8).expand(8, 8), meta(8, 8), out=meta(8, 8)).moved_bytes == 4 * (
        8 + 64 + 64
    )


def test_transfers_run_beside_the_computation() -> None:
    """In forward 100 bytes at 10 a second: 10 s beside 12; in backward nothing but 40 bytes: 4 s."""
    cost = Cost(CARD, 0)
    cost.see("forward", "aten::copy_", (meta(25), meta(25)), meta(25), tensors=[meta(25)] * 3, host=True)
    a = meta(10, 10)
    cost.see("forward", "aten::mm", (a, a), a, tensors=[a, a, a], host=False)
    cost.see("backward", "aten::copy_", (meta(10), meta(10)), meta(10), tensors=[meta(10)] * 3, host=True)
    assert cost.transferred == {"forward": 100, "backward": 40}
    assert cost.step_seconds() == pytest.approx(max(12, 10) + max(0, 4))


def step(recipe: Recipe, row: Row, *, layers: int, levers: Levers = Levers()):  # noqa: B008, frozen
    rows = Lengths(row, None, row.tokens, row.tokens, row)
    return trials_of(recipe, 2**40, rows).outcome(Settings(row.tokens, 512, levers=levers), row.tokens, layers=layers)


def test_a_step_of_a_small_shape_by_hand(shaped) -> None:
    """bf16, two kept layers. Prompt 16, completions 24 and 40: T = 80 tokens, N = 64 of them scored.

    A layer's matrices: M = 1,024 · (2 · 1,024 + 2 · 256 + 3 · 4,096). Forward and the gradient of their input: 4 M T.
    LoRA of rank r: S = sums of inputs and outputs, all three products: 6 r S T.
    Head: logits and the gradient of the hidden states: 4 · N · 1,024 · 32,000.
    Attention: P = 136 + (24 · 16 + 300) + (40 · 16 + 820) pairs, 1,024 wide: 2 + 5 products of 2 · 1,024 P.
    """
    recipe = wide_recipe(shaped(5), load_in_4bit=False, lora_r=16)
    cost = step(recipe, Row(16, (24, 40)), layers=2).cost
    tokens, scored, rank = 80, 64, 16
    matrices = 1024 * (2 * 1024 + 2 * 256 + 3 * 4096)
    sides = 2 * (1024 + 1024) + 2 * (1024 + 256) + 3 * (1024 + 4096)
    pairs = 136 + (24 * 16 + 300) + (40 * 16 + 820)
    layer = 4 * matrices * tokens + 6 * rank * sides * tokens + 7 * 2 * 1024 * pairs
    # The first layer's own input needs no gradient, so neither do q, k and v: 2 · 1,024 · (1,024 + 2 · 256) T less.
    by_hand = 2 * layer + 4 * scored * 1024 * 32_000
    assert cost.operations == pytest.approx(by_hand, rel=0.03)


def test_a_split_pair_is_counted_once(shaped) -> None:
    """Each completion sees itself and a prompt of its own; both packs go forward twice."""
    row = Row(16, (512, 512))
    rows = Lengths(row, None, row.tokens, row.tokens, row)
    trials = trials_of(wide_recipe(shaped(5)), 2**40, rows)
    layout = Layout(("chosen", "rejected"), tokens_per_pack=528, split_pairs=True)
    packs = lengths.batch_of(rows, layout, 528).packs
    cost = trials.outcome(Settings(528, 512, True), 528, layers=1).cost
    assert cost.pairs == visible_pairs(packs[0]) == 528 * 529 // 2


@pytest.mark.parametrize("recomputed", [0, 2])
def test_two_layers_of_14b_by_hand(recomputed: int) -> None:
    """As bench/flops.py: what a step must compute. Recomputed, all goes forward again but for a layer's
    last product, whose result nobody asks for."""
    shape = replace(catalog.CATALOG["qwen2.5-14b"], layers=2)
    recipe, row = Recipe(model="qwen2.5-14b", load_in_4bit=True, lora_r=16), Row(512, (512, 512))
    cost = step(recipe, row, layers=2, levers=Levers(recomputed)).cost
    hidden, mlp, width, keys = shape.hidden_size, shape.intermediate_size, 40 * 128, 8 * 128
    matrices = 2 * shape.matrix_parameters
    lora = 16 * 2 * (2 * (hidden + width) + 2 * (hidden + keys) + 3 * (hidden + mlp))
    attention = 2 * 2 * width * (512**2 + 2 * (1024**2 - 512**2))
    forward = 2 * (matrices + lora) * row.tokens + attention
    gradients = 2 * matrices * row.tokens + 4 * lora * row.tokens + 2.5 * attention
    head = 4 * shape.vocab_size * hidden * 1024
    again = forward - 2 * 2 * hidden * mlp * row.tokens if recomputed else 0
    floor = forward + again + gradients + head
    assert cost.operations == pytest.approx(floor, rel=0.03)
