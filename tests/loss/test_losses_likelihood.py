"""Losses without a reference by hand, and how they behave at certainty."""

import math

import pytest
import torch

from lite.loss.logps import Logps
from lite.loss.losses.likelihood import cpo, log1mexp, orpo, sft, simpo
from tests.loss.draws import logps

HALF, QUARTER = math.log(1 / 2), math.log(1 / 4)


def test_orpo_by_hand():
    """p = 1/2 and 1/4 per token: odds 1 and 1/3, odds ratio 3, sigmoid(ln 3) = 3/4."""
    scored = orpo(logps((4 * HALF, 4)), logps((2 * QUARTER, 2)), beta=0.5)
    assert scored.loss.item() == pytest.approx(math.log(2) - 0.5 * math.log(3 / 4), rel=1e-12)
    assert scored.metrics["log_odds_chosen"].item() == pytest.approx(math.log(3))
    assert scored.metrics["rewards/accuracies"].item() == 1


def test_orpo_over_the_sequence_by_hand():
    """Prompt of 3 tokens at p = 1/4, chosen of 1 at 1/2: NLL = (3 ln 4 + ln 2) / 4 = 7/4 ln 2."""
    scored = orpo(logps((HALF, 1)), logps((QUARTER, 1)), logps((3 * QUARTER, 3)), beta=1.0, nll_over="sequence")
    assert scored.loss.item() == pytest.approx(7 / 4 * math.log(2) - math.log(3 / 4), rel=1e-12)


def test_simpo_by_hand():
    """Means ln 1/2 and ln 1/4 differ by ln 2; beta 2, gamma ln 2: margin ln 2, sigmoid(ln 2) = 2/3."""
    scored = simpo(logps((3 * HALF, 3)), logps((QUARTER, 1)), beta=2.0, gamma=math.log(2))
    assert scored.loss.item() == pytest.approx(-math.log(2 / 3), rel=1e-12)


def test_cpo_by_hand():
    """Totals 2 ln 1/2 and 2 ln 1/4 differ by 2 ln 2; beta 1/2: sigmoid(ln 2) = 2/3; NLL of chosen ln 2."""
    scored = cpo(logps((2 * HALF, 2)), logps((2 * QUARTER, 2)), beta=0.5, alpha=0.25)
    assert scored.loss.item() == pytest.approx(-math.log(2 / 3) + 0.25 * math.log(2), rel=1e-12)


def test_sft_by_hand():
    assert sft(logps((3 * QUARTER, 3))).loss.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("p", [1e-30, 1e-8, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_log1mexp_in_fp64(p: float):
    assert log1mexp(torch.tensor(math.log(p), dtype=torch.float64)).item() == pytest.approx(math.log1p(-p), rel=1e-6)


def test_log1mexp_in_fp32_is_no_worse_than_its_input():
    """p from e⁻⁸⁰ to 1 − 1e-6: within 1e-6 of the fp64 value of the same input; log1p(−exp) is 100 times worse."""
    x = -torch.logspace(-6, 1.9, 400, dtype=torch.float32)
    exact = log1mexp(x.double())
    ours, naive = log1mexp(x).double(), torch.log1p(-torch.exp(x)).double()
    error = ((ours - exact) / exact).abs().max()
    assert error < 1e-6
    assert ((naive - exact) / exact).abs().max() > 100 * error


@pytest.mark.parametrize("chosen", [0.0, -1e-8, -1e-3, -1.0, -200.0])
@pytest.mark.parametrize("rejected", [0.0, -1e-8, -1e-3, -1.0, -200.0])
def test_orpo_is_finite_up_to_certainty(chosen: float, rejected: float):
    """p → 1 makes the odds infinite; loss and gradient stay finite in fp32, for completions of one token too."""
    tokens = torch.tensor([chosen, rejected], requires_grad=True)
    one = torch.tensor([0, 1])
    scored = orpo(Logps(tokens[:1], one), Logps(tokens[1:], one))
    scored.loss.sum().backward()
    assert scored.loss.isfinite().all()
    assert tokens.grad.isfinite().all()
