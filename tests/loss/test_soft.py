"""soft_logps: by hand, against plain whole log-softmax for every kind of head, at extremes, and its error budget."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from lite.loss.head import Head, LowRank, token_logps, top_logps
from lite.loss.soft import SoftTargets, expected_of, soft_logps
from tests.loss.heads import BENDS, KINDS, N, V, assert_within_naive_bf16, make, peak_bytes, wanted, whole_log_softmax

LOG2 = math.log(2)


def plain_soft(hidden: Tensor, head: Head, targets: SoftTargets) -> Tensor:
    logps = whole_log_softmax(hidden, head)
    others = torch.ones_like(logps, dtype=torch.bool).scatter(1, targets.ids, False)
    of_rest = logps.masked_fill(~others, -torch.inf).logsumexp(1)
    return (targets.weights * logps.gather(1, targets.ids)).sum(1) + targets.rest * of_rest


def targets_of(k: int, *, tokens: int = N, words: int = V, dtype: torch.dtype = torch.float64, seed: int = 2):
    """The k likeliest words of a random teacher at each token."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.log_softmax(2 * torch.randn(tokens, words, generator=generator, dtype=dtype), -1)
    return SoftTargets.of(*teacher.topk(k))


def of_logits(logits: list[float]) -> tuple[Tensor, Head]:
    """One token whose logits are these, and so is its hidden state: its gradient is d / d logits."""
    z = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    return z, Head(torch.eye(len(logits), dtype=torch.float64))


def test_value_and_slope_by_hand():
    """q = ½ ¼ ⅛ ⅛; weights ¼ on word 0, ¼ on word 1, ½ on the rest, whose mass under q is ¼.

    Value ¼ log ½ + ¼ log ¼ + ½ log ¼ = −(¼ + ½ + 1) log 2. Slopes w − q of the words: −¼ and 0; of the rest's words,
    each half of it, ½ · (½ − ¼) = ⅛. They sum to 0, as W = 1.
    """
    z, head = of_logits([math.log(q) for q in (1 / 2, 1 / 4, 1 / 8, 1 / 8)])
    targets = SoftTargets(torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.25]]), torch.tensor([0.5]))
    value = soft_logps(z, head, targets, chunk_tokens=5)
    value.sum().backward()
    assert math.isclose(value.item(), -1.75 * LOG2, rel_tol=1e-12)
    assert torch.allclose(z.grad, torch.tensor([[-0.25, 0, 0.125, 0.125]], dtype=torch.float64), atol=1e-12)


def test_targets_and_their_negative_entropy_by_hand():
    """p = ½ ¼ and ¼ for the rest: −(½ · 1 + ¼ · 2 + ¼ · 2) log 2; certainty has none; and 0 log 0 = 0."""
    logps = torch.tensor([[math.log(1 / 2), math.log(1 / 4)], [0.0, -torch.inf]])
    targets = SoftTargets.of(logps, torch.tensor([[3, 1], [2, 0]]))
    assert targets.weights.tolist() == [[0.5, 0.25], [1, 0]]
    assert targets.rest.tolist() == [0.25, 0]
    assert torch.allclose(expected_of(logps), torch.tensor([-1.5 * LOG2, 0]))


def test_forward_kl_by_hand():
    """p = ¼ ¼ ½ against q = ½ ¼ ¼, the last the rest of two words: ¼ log ½ + ½ log 2 = ¼ log 2."""
    z, head = of_logits([math.log(q) for q in (1 / 2, 1 / 4, 1 / 8, 1 / 8)])
    top = torch.tensor([[1 / 4, 1 / 4]], dtype=torch.float64).log()
    value = soft_logps(z, head, SoftTargets.of(top, torch.tensor([[0, 1]])), chunk_tokens=5)
    assert math.isclose((expected_of(top) - value).item(), 0.25 * LOG2, rel_tol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "softcap"), BENDS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
@pytest.mark.parametrize("normal", [True, False])
def test_equals_plain_whole_logits_in_fp64(
    kind: str, scale: float, softcap: float | None, chunk_tokens: int, normal: bool
):
    """Also where the weights do not sum to 1."""
    hidden, head, _ = make(kind, scale=scale, softcap=softcap)
    targets = targets_of(5)
    if not normal:
        targets = SoftTargets(targets.ids, 3 * targets.weights, 0.5 + targets.rest)
    coefficients = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, ours = plain_soft(hidden, head, targets), soft_logps(hidden, head, targets, chunk_tokens=chunk_tokens)
    assert torch.allclose(ours, plain, rtol=1e-12, atol=1e-12)
    expected, found = (torch.autograd.grad(values, wanted(hidden, head), coefficients) for values in (plain, ours))
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 5, V - 1, V])
def test_gradcheck(kind: str, k: int):
    hidden, head, _ = make(kind, scale=0.5, softcap=4.0)
    targets = targets_of(k)

    def values(*_: Tensor) -> Tensor:
        return soft_logps(hidden, head, targets, chunk_tokens=4)

    assert torch.autograd.gradcheck(values, wanted(hidden, head))


def test_one_word_of_weight_1_is_a_label():
    hidden, head, labels = make("frozen")
    one = SoftTargets(labels[:, None], torch.ones(N, 1), torch.zeros(N))
    ours, theirs = soft_logps(hidden, head, one, chunk_tokens=4), token_logps(hidden, head, labels, chunk_tokens=4)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    gradients = [torch.autograd.grad(values.sum(), hidden)[0] for values in (ours, theirs)]
    assert torch.allclose(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_models_own_top_is_where_nothing_pulls(dtype: torch.dtype):
    """With targets from q itself the value is expected_of, the KL is 0 and so is its gradient."""
    hidden, head, labels = make("frozen", dtype=dtype)
    _, top, ids = top_logps(hidden, head, labels, 6, chunk_tokens=4)
    value = soft_logps(hidden, head, SoftTargets.of(top, ids), chunk_tokens=4)
    tolerance = 100 * torch.finfo(dtype).eps
    assert torch.allclose(value, expected_of(top), rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(value.sum(), hidden)
    assert gradient.abs().max() < tolerance


def test_kl_on_the_events_grows_with_k_to_that_of_the_whole_vocabulary():
    hidden, head, _ = make("frozen")
    teacher = torch.log_softmax(torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), -1)
    whole = (teacher.exp() * (teacher - whole_log_softmax(hidden, head))).sum(1)
    previous = torch.zeros(N, dtype=torch.float64)
    for k in (1, 3, 10, V - 1, V):
        top, ids = teacher.topk(k)
        kl = expected_of(top) - soft_logps(hidden, head, SoftTargets.of(top, ids), chunk_tokens=4)
        assert (kl >= previous - 1e-12).all()
        previous = kl
    assert torch.allclose(previous, whole, rtol=1e-10)


def test_the_whole_vocabulary_leaves_no_rest_and_its_rounding_counts_for_nothing():
    """The K = V weights sum to 1 − 6e-8 in fp32: that rest has no word, and log 0 must not come in."""
    hidden, head, _ = make("frozen", dtype=torch.float32)
    targets = targets_of(V, dtype=torch.float32)
    targets = SoftTargets(targets.ids, targets.weights, torch.full((N,), 2.0**-24))
    value = soft_logps(hidden, head, targets, chunk_tokens=4)
    expected = (targets.weights * whole_log_softmax(hidden, head).gather(1, targets.ids)).sum(1)
    assert torch.allclose(value, expected, rtol=1e-5)
    (gradient,) = torch.autograd.grad(value.sum(), hidden)
    assert gradient.isfinite().all()


def test_a_rest_that_the_ids_outweigh_e_to_the_1000_is_exact():
    """Logits 1000 0 0, id 0: log q_rest = log 2 − 1000, where 1 − q(0) is 0 in any float. Slope of z₀: w − W q = −½."""
    z, head = torch.tensor([[1000.0, 0, 0]], requires_grad=True), Head(torch.eye(3))
    targets = SoftTargets(torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([0.5]))
    value = soft_logps(z, head, targets, chunk_tokens=5)
    value.sum().backward()
    assert math.isclose(value.item(), (LOG2 - 1000) / 2, rel_tol=1e-6)
    assert torch.allclose(z.grad, torch.tensor([[-0.5, 0.25, 0.25]]))


def test_ids_that_the_rest_outweighs_e_to_the_1000_are_exact():
    """Logits −1000 0 0, id 0: log q(0) = −1000 − log 2, q_rest = 1. Slope of z₀: ½; of the others, half of −½."""
    z, head = torch.tensor([[-1000.0, 0, 0]], requires_grad=True), Head(torch.eye(3))
    targets = SoftTargets(torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([0.5]))
    value = soft_logps(z, head, targets, chunk_tokens=5)
    value.sum().backward()
    assert math.isclose(value.item(), (-1000 - LOG2) / 2, rel_tol=1e-6)
    assert torch.allclose(z.grad, torch.tensor([[0.5, -0.25, -0.25]]))


def test_words_that_the_model_rules_out_are_no_matter_where_nothing_wants_them():
    """A bias of −inf on id 2, of weight 0, and on the only word of the rest, of weight 0: 0 · log 0 = 0, no NaN."""
    z = torch.zeros(1, 4, requires_grad=True)
    head = Head(torch.eye(4), torch.tensor([0.0, 0.0, -torch.inf, -torch.inf]))
    targets = SoftTargets(torch.tensor([[0, 1, 2]]), torch.tensor([[0.75, 0.25, 0]]), torch.tensor([0.0]))
    value = soft_logps(z, head, targets, chunk_tokens=5)
    value.sum().backward()
    assert math.isclose(value.item(), -LOG2, rel_tol=1e-6)
    assert torch.allclose(z.grad, torch.tensor([[0.25, -0.25, 0, 0]]))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_errs_no_more_than_the_naive_bf16_path(kind: str):
    def targets() -> SoftTargets:
        return SoftTargets.of(*torch.log_softmax(2 * torch.randn(32, 501), -1).topk(20))

    assert_within_naive_bf16(kind, targets, plain_soft, partial(soft_logps, chunk_tokens=10))


def test_memory_is_a_chunk_the_rows_and_a_few_rows_of_events():
    """Within forward: a chunk of logits, (N, D) rows, the values, and copies of one tile's (4, K + 1) events."""
    tokens, width, words, chunk, k = 512, 64, 4096, 32, 8
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(words, width)
    targets = targets_of(k, tokens=tokens, words=words, dtype=torch.float32)
    peak = peak_bytes(lambda: soft_logps(hidden, Head(weight), targets, chunk_tokens=chunk))
    rows, logits, events = tokens * width * 4, chunk * words * 4, 4 * (k + 1) * 4
    assert rows + logits <= peak <= rows + 1.05 * logits + tokens * 8 + 10 * events


def test_targets_move_and_are_cut_together():
    targets = targets_of(3)
    moved = targets.each(lambda tensor: tensor.to("meta"))
    assert moved.ids.is_meta
    assert moved.weights.is_meta
    assert moved.rest.is_meta
    cut = targets[torch.tensor([2, 0])]
    assert torch.equal(cut.ids, targets.ids[[2, 0]])
    assert torch.equal(cut.weights, targets.weights[[2, 0]])
    assert torch.equal(cut.rest, targets.rest[[2, 0]])


def test_shapes_that_do_not_fit_are_named():
    targets = SoftTargets(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match=r"ids \(2, 3\), weights \(2, 4\), rest \(2,\); expected"):
        soft_logps(torch.zeros(2, 4), Head(torch.zeros(5, 4)), targets, chunk_tokens=5)
    with pytest.raises(ValueError, match=r"hidden \(3, 4\)"):
        soft_logps(torch.zeros(3, 4), Head(torch.zeros(5, 4)), targets_of(2, tokens=2, words=5), chunk_tokens=5)


@pytest.mark.gpu
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.125, None), (1.0, 30.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_on_cuda(kind: str, scale: float, softcap: float | None):
    """bf16, a vocabulary of 151,936, K = 64: values to fp32 rounding of the softmax, gradients to a bf16 step."""
    trained, low_rank = KINDS[kind]["trained"], KINDS[kind]["low_rank"]
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 256), torch.randn(151_936, 256) * 0.1
    a, b = torch.randn(8, 256) * 0.1, torch.randn(151_936, 8) * 0.1
    targets = targets_of(64, tokens=300, words=151_936, dtype=torch.float32).to("cuda")
    outcomes = []
    for dtype, compute in ((torch.float64, plain_soft), (torch.bfloat16, partial(soft_logps, chunk_tokens=128))):
        h, w, low, high = (t.bfloat16().to("cuda", dtype) for t in (hidden, weight, a, b))
        adapter = LowRank(low.requires_grad_(), high.requires_grad_(), 0.5) if low_rank else None
        head = Head(w.requires_grad_(trained), None, scale, softcap, adapter)
        values = compute(h.requires_grad_(), head, targets)
        outcomes.append([values.detach(), *torch.autograd.grad(values.sum(), wanted(h, head))])
    for exact, ours in zip(*outcomes, strict=True):
        assert float((exact - ours.double()).norm() / exact.norm()) < 4e-3  # a bf16 step
    if not low_rank:  # whose product is rounded to bf16
        assert torch.allclose(outcomes[1][0].double(), outcomes[0][0], rtol=1e-5, atol=2e-5)
