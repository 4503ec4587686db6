"""Kept weights: dequantised twice a step instead of three times, the same gradients, one layer's weights held."""

from collections import Counter

import pytest
from torch import nn

from lite.errors import ModelError
from lite.memory.checkpoint import checkpoint_layers, quantised_linears
from lite.memory.levers import Levers, pull
from lite.memory.tiles import tile_mlps
from lite.model.layers import decoder_layers
from lite.model.mlp import replace_mlps
from tests.attention.test_varlen import Operators
from tests.memory.small import LAYERS, adapted, batch, beyond, metered, same, step

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOME = ("q_proj", "o_proj")  # the others' products are of a frozen linear alone
BATCH = batch()


def model(kind: str = "nf4", *, targets=ALL) -> nn.Module:
    made = adapted("llama", kind, targets=targets)
    replace_mlps(made)
    return made


def dequantised(of: nn.Module) -> int:
    """How often a 4-bit weight is dequantised in a step."""
    return operators(of)["bitsandbytes::dequantize_4bit"]


def operators(of: nn.Module) -> Counter[str]:
    with Operators() as seen:
        step(of, BATCH)
    return Counter(seen.names)


@pytest.mark.parametrize("targets", [ALL, SOME], ids=["adapted", "frozen"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_stay_bit_for_bit_and_a_dequantisation_of_three_goes(kind: str, targets: tuple[str, ...]) -> None:
    """Seven linears a layer: in forward 7, again 6, for the last one is not reached, in backward 7, but 4 of the first
    layer, whose input has no gradient. Kept, the 6 serve backward too: of n such layers 6 n - 3 are left out."""
    one = model(kind, targets=targets)
    checkpoint_layers(one, 0)
    plain = step(one, BATCH)
    for count in (LAYERS, 2):
        seen = []
        for keep in (False, True):
            checkpoint_layers(one, count, keep_weights=keep)
            assert same(step(one, BATCH), plain)
            seen.append(operators(one))
        if kind == "nf4":
            times = [each["bitsandbytes::dequantize_4bit"] for each in seen]
            assert times == [14 * LAYERS - 3 + 6 * count, 14 * LAYERS]
        else:
            left_out = seen[0] - seen[1]
            assert left_out["aten::mul"] == 6 * count - 3


def test_no_more_is_held_than_one_layers_weights() -> None:
    """In bf16, of all its linears but the last. Kept layers keep nothing more."""
    one = model()
    held = {}
    for count in (LAYERS, 0):
        for keep in (False, True):
            checkpoint_layers(one, count, keep_weights=keep)
            held[count, keep] = beyond(metered(one, BATCH))
    of_layer = quantised_linears(next(iter(decoder_layers(one).values())))
    most = sum(2 * linear.in_features * linear.out_features for linear in of_layer[:-1])
    assert 0 < held[LAYERS, True] - held[LAYERS, False] <= most
    assert held[0, True] == held[0, False]


def test_a_tile_dequantises_gate_and_up_once_for_both_passes() -> None:
    """134 tokens in tiles of 50: three tiles, which go forward and backward one by one; down_proj's stays twice."""
    one, counts = model(), []
    tile_mlps(one, 50)
    checkpoint_layers(one)
    plain, before = step(one, BATCH), beyond(metered(one, BATCH))
    counts.append(dequantised(one))
    checkpoint_layers(one, keep_weights=True)
    assert same(step(one, BATCH), plain)
    counts.append(dequantised(one))
    # Each layer: of attention's four, of each of three tiles' two; the first layer's q, k and v have no backward.
    assert counts[0] - counts[1] == LAYERS * (4 + 3 * 2) - 3
    of_layer = quantised_linears(next(iter(decoder_layers(one).values())))
    most = sum(2 * linear.in_features * linear.out_features for linear in of_layer[:-1])
    assert beyond(metered(one, BATCH)) - before <= most


def test_of_layers_that_come_from_the_host_too() -> None:
    """A slot holds another layer's packed weights by then; what was dequantised is a buffer of its own."""
    one, other = model(), model()
    checkpoint_layers(one)
    pull(other, Levers(LAYERS, keep_weights=True, layers_on_host=LAYERS))
    assert same(step(other, BATCH), step(one, BATCH))
    assert dequantised(other) < dequantised(one)


def test_nothing_is_kept_in_evaluation_nor_after_it_is_unset() -> None:
    """There layers are not recomputed, so all of them would keep their weights at once."""
    one = model()
    checkpoint_layers(one)
    before = dequantised(one)
    checkpoint_layers(one, keep_weights=True)
    evaluated = one.eval()
    held = beyond(metered(evaluated, BATCH))
    checkpoint_layers(one, keep_weights=False)
    assert held == beyond(metered(evaluated, BATCH))
    assert dequantised(one.train()) == before


def test_a_model_that_dequantises_nothing_is_refused() -> None:
    with pytest.raises(ModelError, match="keep_weights: no layer of this model is quantised"):
        pull(model("bf16"), Levers(LAYERS, keep_weights=True))
