"""DPO that looks into the tokens, and distillation, by hand."""

import math

import pytest
import torch

from lite.loss.logps import Logps
from lite.loss.losses.distill import distill
from lite.loss.losses.dpo import dpo
from lite.loss.losses.tokens import ld_dpo, wpo
from tests.loss.draws import logps, pairs

LN2 = math.log(2)


def test_wpo_by_hand() -> None:
    """Chosen −6 over 3 tokens at purity −1.5 a token: e^−½; rejected −5 over 2 at −2: e^−½. w = 1/e times −log 2/3."""
    data = pairs([1.0], [-1.0])
    purity = {"chosen_purity": logps((-4.5, 3)), "rejected_purity": logps((-4.0, 2))}
    scored = wpo(**data, **purity, beta=LN2 / 2)
    assert scored.loss.item() == pytest.approx(-math.log(2 / 3) / math.e, rel=1e-12)
    assert scored.metrics["policy_weights"].item() == pytest.approx(1 / math.e)


def test_wpo_weighs_no_pair_above_1() -> None:
    """Purity −4 a token of chosen, −2 of rejected: e^2 · e^−½ > 1; w = 1: the loss is DPO's."""
    data = pairs([1.0], [-1.0])
    scored = wpo(**data, chosen_purity=logps((-12.0, 3)), rejected_purity=logps((-4.0, 2)), beta=0.3)
    assert scored.loss.item() == pytest.approx(dpo(**data, beta=0.3).loss.item(), rel=1e-12)


def test_wpos_weights_get_no_gradient() -> None:
    """Slope w · DPO's slope: the loss cannot be brought down by making the pair unlikely."""
    slopes = {}
    purity = {"chosen_purity": logps((-4.5, 3)), "rejected_purity": logps((-4.0, 2))}
    for name, score in (("wpo", lambda data: wpo(**data, **purity, beta=0.3)), ("dpo", lambda d: dpo(**d, beta=0.3))):
        data = pairs([1.0], [-1.0])
        data["chosen"].tokens.requires_grad_()
        score(data).loss.sum().backward()
        slopes[name] = data["chosen"].tokens.grad
    assert torch.allclose(slopes["wpo"], slopes["dpo"] / math.e, rtol=1e-12)


def ratios(*completions: list[float]) -> tuple[Logps, Logps]:
    """Policy and reference whose tokens' log ratios are given."""
    offsets = torch.tensor([0, *(len(tokens) for tokens in completions)]).cumsum(0)
    gain = torch.tensor([ratio for tokens in completions for ratio in tokens], dtype=torch.float64)
    reference = torch.linspace(-3, -1, len(gain), dtype=torch.float64)
    return Logps(reference + gain, offsets), Logps(reference, offsets)


def test_ld_dpo_by_hand() -> None:
    """Lengths 4 and 2, then 1 and 3; the tokens past the shorter one count half.

    Pair 1: chosen 1 + 2 + ½ · (4 + 6) = 8, rejected 3: apart 5. Pair 2: chosen 2, rejected 1 + ½ · (2 + 4) = 4: −2.
    """
    (chosen, ref_chosen), (rejected, ref_rejected) = ratios([1, 2, 4, 6], [2]), ratios([1, 2], [1, 2, 4])
    scored = ld_dpo(chosen, rejected, ref_chosen, ref_rejected, beta=1.0, alpha=0.5)
    assert scored.loss.tolist() == pytest.approx([math.log1p(math.exp(-5)), math.log1p(math.exp(2))], rel=1e-12)
    assert scored.metrics["rewards/chosen"].tolist() == pytest.approx([8, 2])
    assert scored.metrics["rewards/rejected"].tolist() == pytest.approx([3, 4])
    assert torch.equal(scored.metrics["logps/chosen"], chosen.total)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_ld_dpos_gradient_is_alpha_beyond_the_shorter_length(alpha: float) -> None:
    (chosen, ref_chosen), (rejected, ref_rejected) = ratios([0, 0, 0], [0]), ratios([0], [0, 0])
    for policy in (chosen, rejected):
        policy.tokens.requires_grad_()
    ld_dpo(chosen, rejected, ref_chosen, ref_rejected, beta=1.0, alpha=alpha).loss.sum().backward()
    assert chosen.tokens.grad.tolist() == pytest.approx([-0.5, -0.5 * alpha, -0.5 * alpha, -0.5])
    assert rejected.tokens.grad.tolist() == pytest.approx([0.5, 0.5, 0.5 * alpha])


def test_ld_dpo_at_1_is_dpo() -> None:
    data = pairs([0.4], [-0.3])
    assert torch.allclose(ld_dpo(**data, alpha=1.0).loss, dpo(**data).loss, rtol=1e-12)


def expected(distributions: list[list[float]], under: list[list[float]]) -> Logps:
    """Σ p log q at each token, of one completion."""
    p, q = torch.tensor(distributions, dtype=torch.float64), torch.tensor(under, dtype=torch.float64)
    return Logps((p * q.log()).sum(-1), torch.tensor([0, len(p)]))


def test_distill_by_hand() -> None:
    """½ kept and ½ the rest; the policy has ¼ and ¾: ½ ln 2 + ½ ln 2/3 = ½ ln 4/3. At a second token it agrees: 0."""
    teacher = [[0.5, 0.5], [0.5, 0.5]]
    scored = distill(expected(teacher, [[0.25, 0.75], [0.5, 0.5]]), expected(teacher, teacher))
    assert scored.loss.item() == pytest.approx(0.5 * math.log(4 / 3) / 2, rel=1e-12)
    assert scored.metrics["kl"].item() == pytest.approx(0.25 * math.log(4 / 3))


def test_what_distill_sees_is_at_most_the_kl_over_all_words() -> None:
    """Words merged into the rest can only come nearer (log-sum inequality), and k = all words is the KL itself."""
    p, q = [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]
    whole = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    found = []
    for k in (1, 2, 3, 4):
        merged = [[[*d[:k], sum(d[k:])] if k < 4 else d] for d in (p, q)]
        found.append(distill(expected(merged[0], merged[1]), expected(merged[0], merged[0])).loss.item())
    assert found == sorted(found)
    assert found[-1] == pytest.approx(whole, rel=1e-12)
    assert 0 < found[0] < whole
