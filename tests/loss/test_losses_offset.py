"""DPO with a gap to win by, by hand."""

import math

import pytest
import torch

from lite import signatures
from lite.loss.losses.dpo import dpo
from lite.loss.losses.offset import gamma_dpo, odpo
from tests.loss.draws import pairs

LN2, LN3 = math.log(2), math.log(3)


def test_odpo_by_hand() -> None:
    """x = 2 ln 2; margin 2 in log: offset ln 2, σ(ln 2) = 2/3; with alpha 2 the offset is 2 ln 2, σ(0) = 1/2."""
    data = {**pairs([LN2], [-LN2]), "margin": torch.tensor([2.0], dtype=torch.float64)}
    assert odpo(**data, beta=1.0).loss.item() == pytest.approx(-math.log(2 / 3), rel=1e-12)
    assert odpo(**data, beta=1.0, alpha=2.0).loss.item() == pytest.approx(LN2, rel=1e-12)


def test_odpo_with_the_margin_as_it_is() -> None:
    """x = ln 6, margin ln 4, alpha ½: offset ln 2; σ(ln 3) = 3/4. Rewards do not know of the offset."""
    data = {**pairs([LN2], [-LN3]), "margin": torch.tensor([math.log(4)], dtype=torch.float64)}
    scored = odpo(**data, beta=1.0, alpha=0.5, scale="linear")
    assert scored.loss.item() == pytest.approx(-math.log(3 / 4), rel=1e-12)
    assert scored.metrics["rewards/margins"].item() == pytest.approx(LN2 + LN3)


def test_odpo_without_weight_is_dpo() -> None:
    data = pairs([0.4], [0.1])
    without = odpo(**data, margin=torch.tensor([0.0]), alpha=0.0).loss
    assert torch.equal(without, dpo(**data).loss)


def test_a_pair_without_margin_teaches_nothing() -> None:
    """log 0 = −∞: the pair is won before it begins, loss 0 and no gradient; never NaN."""
    data = pairs([0.4], [0.1])
    data["chosen"].tokens.requires_grad_()
    loss = odpo(**data, margin=torch.zeros(1)).loss
    loss.sum().backward()
    assert loss.item() == 0
    assert data["chosen"].tokens.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("gamma", [LN3, torch.tensor(LN3), torch.tensor(LN3, dtype=torch.float64, requires_grad=True)])
def test_gamma_dpo_by_hand(gamma: float | torch.Tensor) -> None:
    """x = −ln 3 + gamma = 0: σ = 1/2; the reward margin is −ln 3 whatever gamma, which the metrics hold."""
    scored = gamma_dpo(**pairs([-LN2, -LN2], [LN3 - LN2, LN3 - LN2]), beta=1.0, gamma=gamma)
    assert scored.loss.tolist() == pytest.approx([LN2, LN2], rel=1e-6)
    assert scored.metrics["gamma"].tolist() == pytest.approx([LN3, LN3], rel=1e-6)
    assert scored.metrics["rewards/margins"].tolist() == pytest.approx([-LN3, -LN3])


def test_gamma_learns_to_hide_the_loss() -> None:
    """d loss / d gamma = σ(x + gamma) − 1 = −½ at x + gamma = 0: always upwards, hence its bounds."""
    gamma = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    gamma_dpo(**pairs([0.0], [0.0]), gamma=gamma).loss.sum().backward()
    assert gamma.grad.item() == -0.5
    assert signatures.find("gamma_dpo").learnable == {"gamma": (-1.0, 1.0)}
