"""Each loss by hand, its derivation in the docstring; and what must hold for any logps."""

import math

import pytest
import torch

from lite.loss import registry
from lite.loss.logps import Logps
from lite.loss.losses.likelihood import cpo, log1mexp, orpo, sft, simpo


def logps(*totals_and_lengths: tuple[float, int], dtype: torch.dtype = torch.float64) -> Logps:
    totals, lengths = zip(*totals_and_lengths, strict=True)
    return Logps.from_totals(torch.tensor(totals, dtype=dtype), torch.tensor(lengths))


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


@pytest.mark.parametrize("name", ["orpo", "simpo", "cpo"])
def test_gradients_against_finite_differences(name: str):
    loss = registry.find(name)
    hyperparameters = {h.name: h.default for h in loss.signature.hyperparameters.values()}
    offsets = torch.tensor([0, 2, 3])
    tokens = -torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.1

    def of(tokens: torch.Tensor) -> torch.Tensor:
        return loss(
            {"chosen": Logps(tokens[:3], offsets), "rejected": Logps(tokens[3:], offsets)}, hyperparameters
        ).loss

    assert torch.autograd.gradcheck(of, tokens.requires_grad_())


@pytest.mark.parametrize("name", ["orpo", "simpo", "cpo"])
def test_the_gradient_raises_chosen_against_rejected(name: str):
    loss = registry.find(name)
    hyperparameters = {h.name: h.default for h in loss.signature.hyperparameters.values()}
    totals = torch.tensor([-5.0, -5.0], dtype=torch.float64, requires_grad=True)
    length = torch.tensor([4])
    data = {role: Logps.from_totals(totals[i : i + 1], length) for i, role in enumerate(("chosen", "rejected"))}
    loss(data, hyperparameters).loss.sum().backward()
    assert totals.grad[0] < 0 < totals.grad[1]


@pytest.mark.parametrize("name", ["orpo", "simpo", "cpo"])
def test_a_negative_strength_would_prefer_rejected_and_is_refused(name: str):
    beta = registry.find(name).signature.hyperparameters["beta"]
    assert beta.problem(-1) == "beta = -1: expected a number, at least 0."
    assert beta.problem(0) is None


def test_a_loss_of_the_users_own_is_found_by_file_and_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from lite.loss.logps import Logps\n"
        "from lite.loss.registry import Scored, loss\n"
        "@loss(learning_rate=1e-3, whole_batch=True)\n"
        "def hinge(chosen: Logps, rejected: Logps, *, gap: float = 1.0) -> Scored:\n"
        '    """Hinge.\n\n    gap: margin to win by.\n    """\n'
        "    return Scored((gap - chosen.total + rejected.total).relu(), {})\n"
    )
    loss = registry.find(f"{file}:hinge")
    assert loss.signature.whole_batch
    assert loss.signature.hyperparameters["gap"].help == "margin to win by."
    scored = loss({"chosen": logps((-1.0, 1)), "rejected": logps((-1.5, 1))}, {"gap": 2.0})
    assert scored.loss.item() == pytest.approx(1.5)
