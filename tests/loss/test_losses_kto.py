"""KTO by hand."""

import math

import pytest
import torch

from lite.loss.losses.kto import kto
from lite.loss.registry import Scored
from tests.loss.draws import gained

LN2, LN3 = math.log(2), math.log(3)


def scored(ratios: list[float], kl: list[float], label: list[bool], **hyperparameters: float) -> Scored:
    (completion, ref_completion), (other, ref_other) = gained(*ratios), gained(*kl, length=2, over=-4.0)
    return kto(completion, other, ref_completion, ref_other, torch.tensor(label), **hyperparameters)


def test_kto_by_hand() -> None:
    """z = mean(1, 3) = 2. Desirable at 2 + ln 2: 1 − 2/3. Undesirable at 2 + ln 3: 1 − σ(−ln 3) = 3/4."""
    result = scored([2 + LN2, 2 + LN3], [1.0, 3.0], [True, False], beta=1.0)
    assert result.loss.tolist() == pytest.approx([1 / 3, 3 / 4], rel=1e-12)
    metrics = {name: value.tolist() for name, value in result.metrics.items()}
    nan = math.nan
    assert metrics["rewards/chosen"] == pytest.approx([2 + LN2, nan], nan_ok=True)
    assert metrics["rewards/rejected"] == pytest.approx([nan, 2 + LN3], nan_ok=True)
    assert metrics["rewards/margins"] == pytest.approx([LN2 - LN3] * 2)
    assert metrics["rewards/accuracies"] == [1, 0]
    assert metrics["logps/chosen"] == pytest.approx([-5 + LN2, nan], nan_ok=True)
    assert metrics["logps/rejected"] == pytest.approx([nan, -5 + LN3], nan_ok=True)
    assert metrics["kl"] == pytest.approx([2, 2])


def test_weights_of_the_two_kinds() -> None:
    """At z both lose ½, times their weight; beta does not matter there."""
    result = scored([1.0, 1.0], [1.0, 1.0], [True, False], beta=0.3, desirable_weight=3.0, undesirable_weight=0.5)
    assert result.loss.tolist() == pytest.approx([1.5, 0.25], rel=1e-12)


def test_the_kl_is_not_negative() -> None:
    """Partners −5 and 1: mean −2, held at 0; a desirable row at ln 2 then loses 1/3."""
    result = scored([LN2, LN2], [-5.0, 1.0], [True, True], beta=1.0)
    assert result.loss.tolist() == pytest.approx([1 / 3, 1 / 3], rel=1e-12)
    assert result.metrics["kl"].tolist() == [0, 0]


def test_a_batch_of_one_kind_has_no_margin() -> None:
    result = scored([LN2], [0.0], [True])
    assert result.metrics["rewards/margins"].isnan().all()
    assert result.metrics["rewards/rejected"].isnan().all()
    assert result.loss.isfinite().all()


def test_the_kl_partners_get_no_gradient() -> None:
    """z is a reference point: only the completions' own logps are trained."""
    (completion, ref_completion), (other, ref_other) = gained(0.5, 0.5), gained(1.0, 1.0)
    completion.tokens.requires_grad_()
    other.tokens.requires_grad_()
    kto(completion, other, ref_completion, ref_other, torch.tensor([True, False])).loss.sum().backward()
    assert other.tokens.grad is None
    assert completion.tokens.grad[0] < 0 < completion.tokens.grad[-1]
