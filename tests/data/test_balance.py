"""What is advised for desirable and undesirable rows in unequal numbers: by hand, and that following it is enough."""

import itertools
import re

import pytest

from lite.data.balance import advice
from lite.data.examples import Place, TokenExample


def rows(desirable: int, undesirable: int, weight: float = 1.0) -> list[TokenExample]:
    """`weight` is the desirable ones'."""
    place = Place("a.jsonl", 1)
    good = [TokenExample((1,), ((2,),), place, weight=weight, label=True)] * desirable
    return good + [TokenExample((1,), ((2,),), place, label=False)] * undesirable


def test_by_hand():
    """30 to 120: desirable_weight from 4 to 16/3, or undesirable_weight from 3/16 to 1/4; rounded inwards."""
    assert advice(rows(30, 120), 1.0, 1.0) == (
        "30 rows are desirable and 120 undesirable, which count 0.25 to 1 with desirable_weight 1 and "
        "undesirable_weight 1; KTO advises 1 to 1.33. Take desirable_weight 4 to 5.33, or undesirable_weight 0.188 to "
        "0.25."
    )


@pytest.mark.parametrize(
    ("counts", "weights"), [((10, 10), (1, 1)), ((4, 3), (1, 1)), ((30, 120), (4, 1)), ((30, 120), (1, 0.25))]
)
def test_nothing_is_said_where_they_balance(counts, weights):
    assert advice(rows(*counts), *weights) is None


def test_a_rows_own_weight_counts():
    assert advice(rows(30, 120, weight=4.0), 1.0, 1.0) is None
    assert "which count 4 to 1" in advice(rows(10, 10, weight=4.0), 1.0, 1.0)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 7.0), (5.0, 0.0), (0.0, 5.0)])
def test_either_end_of_either_advice_is_enough(weights):
    for counts in itertools.product((1, 3, 7, 150, 143_211), repeat=2):
        told = advice(rows(*counts), *weights)
        if told is not None:
            found = re.findall(r"(?:Take|or) (\w+_weight) (\S+) to (\d\S*?)[,.]? ?(?=or|$)", told)
            assert len(found) == sum(weight > 0 for weight in weights), told
            for name, *ends in found:
                for end in ends:
                    changed = (float(end), weights[1]) if name == "desirable_weight" else (weights[0], float(end))
                    assert advice(rows(*counts), *changed) is None, (told, end)


def test_one_kind_alone():
    told = advice(rows(0, 12), 1.0, 1.0)
    assert told.startswith("all 12 rows are undesirable: ")
    assert told.endswith("Add desirable rows.")
    assert advice(rows(12, 0), 1.0, 1.0).endswith("Add undesirable rows.")


def test_without_labels_or_without_weights():
    unlabelled = [TokenExample((1,), ((2,), (3,)), Place("a.jsonl", 1))]
    assert advice(unlabelled, 1.0, 1.0) is None
    assert advice(rows(3, 3), 0.0, 0.0).endswith("Take a weight above 0.")
