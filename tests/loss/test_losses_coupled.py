"""Losses that compare pairs across the batch, by hand."""

import math

import pytest
import torch

from lite.loss.losses.coupled import aot, bco_pair
from tests.loss.draws import logps, pairs

LN2, LN3 = math.log(2), math.log(3)


def softplus(x: float) -> float:
    """−log σ(−x)."""
    return math.log1p(math.exp(x))


def test_aot_by_hand() -> None:
    """Margins 5, 1 and the reference's 2, 3, sorted 1, 5 and 2, 3: pair 1 has 5 − 3, pair 2 has 1 − 2."""
    ones = [(-9.0, 2), (-9.0, 1)]
    data = {
        "chosen": logps((-4.0, 2), (-8.0, 1)),
        "rejected": logps(*ones),
        "ref_chosen": logps((-7.0, 2), (-6.0, 1)),
        "ref_rejected": logps(*ones),
    }
    scored = aot(**data, beta=1.0)
    assert scored.loss.tolist() == pytest.approx([softplus(-2), softplus(1)], rel=1e-12)
    smoothed = aot(**data, beta=1.0, label_smoothing=0.25).loss
    assert smoothed[0].item() == pytest.approx(0.75 * softplus(-2) + 0.25 * softplus(2), rel=1e-12)
    # Rewards are the pair's own, not its quantile's: −4 + 7, −8 + 6.
    assert scored.metrics["rewards/chosen"].tolist() == pytest.approx([3, -2])


def test_aot_unpaired_by_hand() -> None:
    """Log ratios of chosen 3, 1 and of rejected 0, 2: sorted 1, 3 and 0, 2. Both are 1 ahead of their quantile."""
    scored = aot(**pairs([3.0, 1.0], [0.0, 2.0]), beta=1.0, variant="unpaired")
    assert scored.loss.tolist() == pytest.approx([softplus(-1), softplus(-1)], rel=1e-12)
    assert scored.metrics["rewards/accuracies"].tolist() == [1, 0]


def test_aot_of_one_pair_is_dpo() -> None:
    for variant in ("paired", "unpaired"):
        assert aot(**pairs([LN2], [-LN2]), beta=0.5, variant=variant).loss.item() == pytest.approx(-math.log(2 / 3))


def test_bco_by_hand() -> None:
    """Rewards ln 2 + 1, 1 and 1, 1 − ln 2: δ = 1. −log σ(ln 2) − log σ(0) and −log σ(0) − log σ(ln 2)."""
    scored = bco_pair(**pairs([LN2 + 1, 1.0], [1.0, 1 - LN2]), beta=1.0)
    both = -math.log(2 / 3) + LN2
    assert scored.loss.tolist() == pytest.approx([both, both], rel=1e-12)
    assert scored.metrics["rewards/chosen"].tolist() == pytest.approx([LN2 + 1, 1])  # without δ, as TRL logs them


def test_bco_without_shift_by_hand() -> None:
    """Rewards ln 2 and −ln 3: −log 2/3 − log 3/4."""
    scored = bco_pair(**pairs([LN2], [-LN3]), beta=1.0, reward_shift=False)
    assert scored.loss.item() == pytest.approx(LN2, rel=1e-12)


def test_the_shift_gets_no_gradient() -> None:
    """Rewards 2, 0 and −1, −1: δ = 0; slopes −σ(−2), −½ and σ(−1). Through δ each would be 0.02 higher."""
    data = pairs([2.0, 0.0], [-1.0, -1.0])
    for role in ("chosen", "rejected"):
        data[role].tokens.requires_grad_()
    bco_pair(**data, beta=1.0).loss.sum().backward()
    assert data["chosen"].tokens.grad.tolist() == pytest.approx([-1 / (1 + math.e**2)] * 3 + [-0.5] * 3)
    assert data["rejected"].tokens.grad.tolist() == pytest.approx([1 / (1 + math.e)] * 4)


def test_the_batch_is_shifted_as_one() -> None:
    """All rewards moved by the same amount, as when every completion gets likelier: the loss does not notice."""
    one, moved = pairs([0.3, 0.9], [-0.4, 0.1]), pairs([1.3, 1.9], [0.6, 1.1])
    assert torch.allclose(bco_pair(**one, beta=1.0).loss, bco_pair(**moved, beta=1.0).loss, rtol=1e-12)
