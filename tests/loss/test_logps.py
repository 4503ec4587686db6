import torch

from lite.loss.logps import Logps


def test_totals_lengths_and_means_by_hand():
    """Tokens −1 −2 | −3 −4 −5: totals −3 and −12, lengths 2 and 3, means −1.5 and −4."""
    logps = Logps(torch.tensor([-1.0, -2, -3, -4, -5]), torch.tensor([0, 2, 5]))
    assert logps.total.tolist() == [-3, -12]
    assert logps.length.tolist() == [2, 3]
    assert logps.mean.tolist() == [-1.5, -4]


def test_gradient_of_the_mean_reaches_its_own_tokens_only():
    tokens = torch.zeros(5, requires_grad=True)
    Logps(tokens, torch.tensor([0, 2, 5])).mean[1].backward()
    assert torch.allclose(tokens.grad, torch.tensor([0, 0, 1 / 3, 1 / 3, 1 / 3]))


def test_from_totals_gives_back_totals_and_lengths():
    total, length = torch.tensor([-6.0, -1.0]), torch.tensor([4, 1])
    logps = Logps.from_totals(total, length)
    assert torch.allclose(logps.total, total)
    assert torch.equal(logps.length, length)
