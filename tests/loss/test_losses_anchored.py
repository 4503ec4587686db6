"""Losses with a target for each completion, by hand."""

import math
from collections.abc import Callable

import pytest
import torch

from lite.loss.losses.anchored import apo_down, apo_zero, nca_pair, sppo_hard
from lite.loss.registry import Scored
from tests.loss.draws import pairs

LN2, LN3 = math.log(2), math.log(3)


def test_apo_zero_by_hand() -> None:
    """σ(ln 2) = 2/3, σ(−ln 3) = 1/4: 1 − 2/3 + 1/4 = 7/12."""
    assert apo_zero(**pairs([LN2], [-LN3]), beta=1.0).loss.item() == pytest.approx(7 / 12, rel=1e-12)


def test_apo_down_by_hand() -> None:
    """σ(ln 2) = 2/3, σ(ln 2 + ln 3) = 6/7: 2/3 + 1 − 6/7 = 17/21."""
    assert apo_down(**pairs([LN2], [-LN3]), beta=1.0).loss.item() == pytest.approx(17 / 21, rel=1e-12)


@pytest.mark.parametrize(("loss", "chosen_slope"), [(apo_zero, -0.196612), (apo_down, 0.196612 - 0.104994)])
def test_apo_down_lowers_both_where_apo_zero_raises_chosen(loss: Callable[..., Scored], chosen_slope: float) -> None:
    """Rewards 1 and −1: slopes in chosen −σ′(1) = −0.1966, and σ′(1) − σ′(2) = 0.0916; rejected falls in both."""
    data = pairs([1.0], [-1.0])
    for role in ("chosen", "rejected"):
        data[role].tokens.requires_grad_()
    loss(**data, beta=1.0).loss.sum().backward()
    assert data["chosen"].tokens.grad[0].item() == pytest.approx(chosen_slope, abs=1e-6)
    assert data["rejected"].tokens.grad[0].item() > 0


def test_nca_by_hand() -> None:
    """−log 2/3 − ½ log 1/3 − ½ log σ(ln 3), with rewards ln 2 and −ln 3."""
    expected = -math.log(2 / 3) - 0.5 * math.log(1 / 3) - 0.5 * math.log(3 / 4)
    assert nca_pair(**pairs([LN2], [-LN3]), beta=1.0).loss.item() == pytest.approx(expected, rel=1e-12)


def test_nca_stops_raising_chosen() -> None:
    """Slope in r_chosen: σ(r) − 1 + ½ σ(r) = 0 at σ(r) = 2/3, r = ln 2, where DPO would go on."""
    data = pairs([LN2], [-9.0])
    data["chosen"].tokens.requires_grad_()
    nca_pair(**data, beta=1.0).loss.sum().backward()
    assert torch.allclose(data["chosen"].tokens.grad, torch.zeros(3, dtype=torch.float64), atol=1e-12)


def test_sppo_by_hand() -> None:
    """beta ¼ asks for ± 2: (3 − 2)² + (−4 + 2)² = 5."""
    assert sppo_hard(**pairs([3.0], [-4.0]), beta=0.25).loss.item() == pytest.approx(5, rel=1e-12)
