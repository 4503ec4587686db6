"""What must hold for every loss there is, whatever its formula; the formulas by hand are in test_losses_*.py."""

import itertools
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from lite import signatures
from lite.loss import registry
from lite.loss.logps import Logps
from lite.loss.registry import Scored
from tests.loss.draws import BESIDE, POLICY, Data, cases, defaults, draw, extremes, logps, only

REGISTERED = signatures.registered()
REFERENCE = [(name, options) for name, options in cases() if REGISTERED[name].reference]
# DiscoPOP starts on a slope that leads the other way: test_losses_dpo.py.
PAIRWISE = [
    (name, options)
    for name, options in cases()
    if REGISTERED[name].example == "preference" and options != {"variant": "discopop"}
]
every_loss = pytest.mark.parametrize(("name", "options"), cases())


def score(name: str, data: Data, options: dict[str, object]) -> Scored:
    loss = registry.find(name)
    return loss(data, {**defaults(loss.signature), **options})


def with_tokens(data: Data, tokens: Tensor) -> Data:
    """The data with other tokens of the policy, taken from one long vector."""
    roles = [role for role in POLICY if role in data]
    parts = tokens.split([len(data[role].tokens) for role in roles])
    return {**data, **{role: Logps(part, data[role].offsets) for role, part in zip(roles, parts, strict=True)}}


def policy_tokens(data: Data) -> Tensor:
    return torch.cat([data[role].tokens for role in POLICY if role in data])


def held(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with all that it detaches kept at its value in the first call.

    Finite differences then see what a stop-gradient means: a number that does not move with the parameters.
    """
    kept: list[Tensor] = []
    detach = Tensor.detach

    def call(*arguments: Tensor) -> Tensor:
        turn = itertools.count()

        def replay(tensor: Tensor) -> Tensor:
            i = next(turn)
            if i == len(kept):
                kept.append(detach(tensor))
            return kept[i]

        with mock.patch.object(Tensor, "detach", replay):
            return function(*arguments)

    return call


@every_loss
def test_gradients_against_finite_differences(name: str, options: dict[str, object]) -> None:
    """In fp64, with respect to every logp of the policy and to the scalars that are trained with it."""
    data, trained = draw(REGISTERED[name]), list(REGISTERED[name].learnable)
    start = [torch.tensor(defaults(REGISTERED[name])[scalar], dtype=torch.float64) for scalar in trained]

    def of(tokens: Tensor, *scalars: Tensor) -> Tensor:
        return score(name, with_tokens(data, tokens), {**options, **dict(zip(trained, scalars, strict=True))}).loss

    inputs = [tensor.requires_grad_() for tensor in (policy_tokens(data), *start)]
    assert torch.autograd.gradcheck(held(of), inputs)


@every_loss
def test_a_loss_and_metrics_per_example(name: str, options: dict[str, object]) -> None:
    data = draw(REGISTERED[name], 4)
    scored = score(name, with_tokens(data, policy_tokens(data).requires_grad_()), options)
    assert scored.loss.shape == (4,)
    assert scored.loss.requires_grad
    assert scored.metrics
    for metric, value in scored.metrics.items():
        assert value.shape == (4,), metric
        assert not value.requires_grad, metric


@every_loss
def test_the_order_of_examples_does_not_matter(name: str, options: dict[str, object]) -> None:
    """Permuted examples have permuted losses and metrics; so a batch as a whole is worth the same, coupled or not."""

    order, data = [3, 0, 4, 2, 1], draw(REGISTERED[name])
    one = score(name, data, options)
    other = score(name, only(data, order), options)
    assert torch.allclose(other.loss, one.loss[order], rtol=1e-12)
    for metric in one.metrics:
        assert torch.allclose(other.metrics[metric], one.metrics[metric][order], rtol=1e-12, equal_nan=True), metric


@every_loss
def test_certain_and_impossible_completions_stay_finite(name: str, options: dict[str, object]) -> None:
    """Logps of 0 and of −10,000 in every role at once: in fp32, loss and gradient are numbers."""
    data = extremes(REGISTERED[name])
    tokens = policy_tokens(data).requires_grad_()
    scored = score(name, with_tokens(data, tokens), options)
    scored.loss.sum().backward()
    assert scored.loss.isfinite().all()
    assert tokens.grad.isfinite().all()


@every_loss
def test_without_numbers_too(name: str, options: dict[str, object]) -> None:
    """On meta tensors, which have shapes and no values: what a dry run of the step is made of."""
    drawn = draw(REGISTERED[name], dtype=torch.float32)
    data = {
        role: value.to("meta")
        if isinstance(value, Tensor)
        else Logps(value.tokens.to("meta"), value.offsets.to("meta"))
        for role, value in drawn.items()
    }
    assert score(name, data, options).loss.shape == (5,)


@pytest.mark.parametrize(("name", "options"), REFERENCE)
def test_where_policy_is_reference_no_reward_is_given(name: str, options: dict[str, object]) -> None:
    """Exactly 0 in fp32, at the length of real completions: rewards of 1,000 tokens leave no rounding behind."""
    offsets = torch.tensor([0, 1000, 1700, 1701])
    tokens = -8 * torch.rand(1701, generator=torch.Generator().manual_seed(0))
    data = {role: Logps(tokens, offsets) for role in REGISTERED[name].data if role not in ("label", "margin")}
    data |= {"label": torch.tensor([True, False, True]), "margin": torch.ones(3)}
    metrics = score(name, data, options).metrics
    rewards = {metric: value for metric, value in metrics.items() if metric.startswith(("rewards/", "kl"))}
    assert rewards
    for metric, value in rewards.items():
        assert not value.nan_to_num().any(), metric


@pytest.mark.parametrize(("name", "options"), PAIRWISE)
def test_the_gradient_raises_chosen_against_rejected(name: str, options: dict[str, object]) -> None:
    """From policy = reference, one step down the gradient widens the margin. (APO-down gets there by lowering both.)"""
    data = draw(REGISTERED[name], 1)
    tokens = policy_tokens(data).requires_grad_()
    scored_data = with_tokens(data, tokens)
    scored_data |= {f"ref_{role}": data[role] for role in ("chosen", "rejected") if f"ref_{role}" in data}
    score(name, scored_data, options).loss.sum().backward()
    stepped = with_tokens(data, -tokens.grad)
    assert stepped["chosen"].total > stepped["rejected"].total


@pytest.mark.parametrize("name", REGISTERED)
def test_defaults_are_values_that_a_user_could_set(name: str) -> None:
    for hyperparameter in REGISTERED[name].hyperparameters.values():
        assert hyperparameter.problem(hyperparameter.default) is None


@pytest.mark.parametrize("name", [name for name in REGISTERED if "beta" in REGISTERED[name].hyperparameters])
def test_a_negative_strength_would_prefer_rejected_and_is_refused(name: str) -> None:
    beta = REGISTERED[name].hyperparameters["beta"]
    assert beta.problem(-1) == f"beta = -1: expected {beta.expected}."
    assert beta.problem(1) is None


@pytest.mark.parametrize("name", [name for name in REGISTERED if "label_smoothing" in REGISTERED[name].hyperparameters])
def test_labels_that_are_wrong_more_often_than_right_are_refused(name: str) -> None:
    smoothing = REGISTERED[name].hyperparameters["label_smoothing"]
    assert smoothing.problem(0.5) == f"label_smoothing = 0.5: expected {smoothing.expected}."
    assert smoothing.problem(0.49) is None


def test_the_whole_batch_is_asked_for_by_the_losses_that_couple_it() -> None:
    """A loss without whole_batch gives an example the same loss alone and among others; one with it does not."""
    for name, signature in REGISTERED.items():
        data = draw(signature)
        alone = torch.cat([score(name, only(data, [i]), {}).loss for i in range(5)])
        assert torch.allclose(alone, score(name, data, {}).loss, rtol=1e-12) is not signature.whole_batch, name


def test_a_reference_stands_beside_its_policy() -> None:
    """The drawn data cover what there is to ask for, and a role that is scored for the reference is for the policy."""
    asked = {role for signature in REGISTERED.values() for role in signature.data}
    assert asked <= {*POLICY, *BESIDE, "label", "margin"}
    for signature in REGISTERED.values():
        assert {role.removeprefix("ref_") for role in signature.data if role.startswith("ref_")} <= {*signature.data}


def test_a_loss_of_the_users_own_is_found_by_file_and_name(tmp_path) -> None:
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
