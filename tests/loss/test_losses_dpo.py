"""DPO and the losses of the same difference, by hand: log ratios of ln 2 and the like, the derivation in each test."""

import math

import pytest
import torch

from lite.loss.losses.dpo import dpo, exo_pair, ipo, robust, rpo
from tests.loss.draws import logps, pairs

LN2, LN3 = math.log(2), math.log(3)


def test_dpo_by_hand() -> None:
    """Log ratios ln 2 and −ln 2 differ by 2 ln 2; beta 1/2: x = ln 2, σ = 2/3. Rewards ± ½ ln 2."""
    scored = dpo(**pairs([LN2], [-LN2]), beta=0.5)
    assert scored.loss.item() == pytest.approx(-math.log(2 / 3), rel=1e-12)
    metrics = {name: value.item() for name, value in scored.metrics.items()}
    assert metrics == pytest.approx(
        {
            "rewards/chosen": 0.5 * LN2,
            "rewards/rejected": -0.5 * LN2,
            "rewards/accuracies": 1.0,
            "rewards/margins": LN2,
            "logps/chosen": -7.0 + LN2,
            "logps/rejected": -4.0 - LN2,
        }
    )


def test_dpo_where_policy_is_reference() -> None:
    """x = 0: σ = 1/2. A tie is not a pair won."""
    scored = dpo(**pairs([0.0], [0.0]))
    assert scored.loss.item() == pytest.approx(LN2, rel=1e-12)
    assert scored.metrics["rewards/accuracies"].item() == 0


def test_dpo_without_strength_has_no_gradient() -> None:
    """beta = 0: x = 0 whatever the policy."""
    data = pairs([0.3], [-0.2])
    data["chosen"].tokens.requires_grad_()
    dpo(**data, beta=0.0).loss.sum().backward()
    assert not data["chosen"].tokens.grad.any()


def test_conservative_dpo_by_hand() -> None:
    """σ(ln 2) = 2/3 and σ(−ln 2) = 1/3, the second with weight 1/4."""
    scored = dpo(**pairs([LN2], [0.0]), beta=1.0, label_smoothing=0.25)
    assert scored.loss.item() == pytest.approx(-0.75 * math.log(2 / 3) - 0.25 * math.log(1 / 3), rel=1e-12)


def test_hinge_by_hand() -> None:
    """x = ½ · 1 misses 1 by ½; x = ½ · 3 does not; smoothed by 1/4, the second costs ¼ · max(0, 1 + 1.5)."""
    data = pairs([1.0, 2.0], [0.0, -1.0])
    assert dpo(**data, beta=0.5, variant="hinge").loss.tolist() == pytest.approx([0.5, 0.0])
    smoothed = dpo(**data, beta=0.5, variant="hinge", label_smoothing=0.25).loss
    assert smoothed.tolist() == pytest.approx([0.75 * 0.5 + 0.25 * 1.5, 0.25 * 2.5])


def test_discopop_by_hand() -> None:
    """x = ln 2, temperature 1: m = σ(ln 2) = 2/3; logistic −ln 2/3, exponential 1/2: 1/3 · ln 3/2 + 2/3 · 1/2."""
    scored = dpo(**pairs([LN2], [0.0]), beta=1.0, variant="discopop", temperature=1.0)
    assert scored.loss.item() == pytest.approx(math.log(3 / 2) / 3 + 1 / 3, rel=1e-12)


def test_discopop_starts_on_a_slope_against_chosen() -> None:
    """At x = 0, m = ½ and dm/dx = 1/(4 τ) = 5: slope −5 ln 2 − ½ · ½ + 5 · 1 − ½ · 1 = 4.25 − 5 ln 2 > 0."""
    data = pairs([0.0], [0.0])
    data["chosen"].tokens.requires_grad_()
    dpo(**data, beta=1.0, variant="discopop", temperature=0.05).loss.sum().backward()
    assert data["chosen"].tokens.grad.tolist() == pytest.approx([4.25 - 5 * LN2] * 3)


@pytest.mark.parametrize(
    ("divergence", "f_alpha", "chosen", "rejected"),
    [
        # f′ at t = 2 and at t = 1/2
        ("reverse_kl", 0.5, LN2, -LN2),
        ("forward_kl", 0.5, 1 - 1 / 2, 1 - 2),
        ("js", 0.5, math.log(4 / 3), math.log(2 / 3)),
        ("alpha", 0.5, 2 - math.sqrt(2), 2 - 2 * math.sqrt(2)),  # (1 − t^−½) / ½
        ("alpha", 0.0, LN2, -LN2),
        ("alpha", 1.0, 1 - 1 / 2, 1 - 2),
    ],
)
def test_f_divergences_by_hand(divergence: str, f_alpha: float, chosen: float, rejected: float) -> None:
    data = pairs([LN2], [-LN2])
    scored = dpo(**data, beta=0.5, f_divergence=divergence, f_alpha=f_alpha)
    assert scored.loss.item() == pytest.approx(math.log1p(math.exp(-0.5 * (chosen - rejected))), rel=1e-12)
    assert scored.metrics["rewards/margins"].item() == pytest.approx(LN2)  # of the log ratios, whatever f
    by_length = dpo(**data, beta=0.5, f_divergence=divergence, f_alpha=f_alpha, length_normalised=True)
    assert by_length.loss.item() == pytest.approx(math.log1p(math.exp(-0.5 * (chosen / 3 - rejected / 2))), rel=1e-12)


def test_alpha_near_reverse_kl_keeps_its_digits() -> None:
    """f_alpha = 1e-9, t = 2: (1 − 2^−1e-9) / 1e-9 = ln 2 up to 1e-9; the naive difference loses half its digits."""
    near = dpo(**pairs([LN2], [0.0]), f_divergence="alpha", f_alpha=1e-9).loss
    assert near.item() == pytest.approx(dpo(**pairs([LN2], [0.0])).loss.item(), rel=1e-9)


def test_length_normalised_by_hand() -> None:
    """3 ln 2 over 3 tokens and −2 ln 2 over 2: ln 2 and −ln 2 a token; beta ½: σ(ln 2) = 2/3. Rewards are of totals."""
    scored = dpo(**pairs([3 * LN2], [-2 * LN2]), beta=0.5, length_normalised=True)
    assert scored.loss.item() == pytest.approx(-math.log(2 / 3), rel=1e-12)
    assert scored.metrics["rewards/margins"].item() == pytest.approx(2.5 * LN2)


def test_robust_by_hand() -> None:
    """x = ln 2, ε = ¼: (¾ · ln 3/2 − ¼ · ln 3) / ½."""
    scored = robust(**pairs([LN2], [0.0]), beta=1.0, label_smoothing=0.25)
    assert scored.loss.item() == pytest.approx(1.5 * math.log(3 / 2) - 0.5 * LN3, rel=1e-12)


def test_robust_is_dpo_on_average() -> None:
    """Labels swapped with probability ε = ¼: ¾ · robust(pair) + ¼ · robust(swapped pair) = dpo(pair)."""
    right, swapped = pairs([0.7], [-0.2]), pairs([-0.2], [0.7])
    mean = 0.75 * robust(**right, label_smoothing=0.25).loss + 0.25 * robust(**swapped, label_smoothing=0.25).loss
    assert mean.item() == pytest.approx(dpo(**right).loss.item(), rel=1e-12)


def test_exo_by_hand() -> None:
    """q = σ(ln 3) = ¾, ε = ⅓: ¾ · ln(¾ / ⅔) + ¼ · ln(¼ / ⅓)."""
    scored = exo_pair(**pairs([LN3], [0.0]), beta=1.0, label_smoothing=1 / 3)
    assert scored.loss.item() == pytest.approx(0.75 * math.log(9 / 8) + 0.25 * math.log(3 / 4), rel=1e-12)


def test_exo_is_zero_where_the_policy_has_the_labels_doubt() -> None:
    """q = 1 − ε: KL = 0, with no slope."""
    data = pairs([LN3], [0.0])
    data["chosen"].tokens.requires_grad_()
    loss = exo_pair(**data, beta=1.0, label_smoothing=0.25).loss
    loss.sum().backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert torch.allclose(data["chosen"].tokens.grad, torch.zeros(3, dtype=torch.float64), atol=1e-15)


def test_ipo_by_hand() -> None:
    """6 over 3 tokens and −2 over 2: 2 and −1 a token, 3 apart; beta ¼ asks for 2: (3 − 2)² = 1."""
    scored = ipo(**pairs([6.0], [-2.0]), beta=0.25)
    assert scored.loss.item() == pytest.approx(1, rel=1e-12)
    assert scored.metrics["rewards/margins"].item() == pytest.approx(2)


def test_rpo_by_hand() -> None:
    """DPO's −ln 2/3, and ½ · NLL per token: chosen has −7 + ln 2 over 3 tokens."""
    scored = rpo(**pairs([LN2], [0.0]), beta=1.0, alpha=0.5)
    nll = (7 - LN2) / 3
    assert scored.loss.item() == pytest.approx(-math.log(2 / 3) + 0.5 * nll, rel=1e-12)
    assert scored.metrics["nll_loss"].item() == pytest.approx(nll)


def test_rewards_of_long_completions_are_not_rounding() -> None:
    """2,000 tokens of −3.7 each, the policy 1e-6 likelier at each: 0.002 nats, which totals in fp32 cannot hold."""
    reference = logps((-3.7 * 2000, 2000), dtype=torch.float32)
    policy = logps((-3.7 * 2000, 2000), dtype=torch.float32)
    policy.tokens.add_(1e-6)
    step = float(policy.tokens[0] - reference.tokens[0])  # 1e-6 as fp32 has it at −3.7
    metrics = dpo(policy, reference, reference, reference, beta=1.0).metrics
    assert metrics["rewards/chosen"].item() == pytest.approx(2000 * step, rel=1e-5)
