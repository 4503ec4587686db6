"""Losses that hold each completion of a pair to a target of its own, not only the one against the other."""

import torch
import torch.nn.functional as F

from lite.loss.logps import Logps
from lite.loss.registry import NonNegative, Positive, Scored, loss
from lite.loss.rewards import log_ratio, pair_metrics


@loss(learning_rate=2e-6)
def apo_zero(
    chosen: Logps, rejected: Logps, ref_chosen: Logps, ref_rejected: Logps, *, beta: NonNegative = 0.1
) -> Scored:
    """APO-zero: chosen up and rejected down; for chosen better than what the model writes.

    loss = 1 − σ(beta · log p/p_ref(chosen)) + σ(beta · log p/p_ref(rejected))

    beta: how closely to stay with the reference.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7, beta = 0.1; with TRL's constant 1.
    """
    ratios = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    losses = torch.sigmoid(-beta * ratios[0]) + torch.sigmoid(beta * ratios[1])
    return Scored(losses, pair_metrics(*ratios, beta, (chosen.total, rejected.total)))


@loss(learning_rate=2e-6)
def apo_down(
    chosen: Logps, rejected: Logps, ref_chosen: Logps, ref_rejected: Logps, *, beta: NonNegative = 0.1
) -> Scored:
    """APO-down: both down, rejected further; for chosen worse than what the model writes.

    loss = σ(beta · log p/p_ref(chosen)) + 1 − σ(beta · (log p/p_ref(chosen) − log p/p_ref(rejected)))

    beta: how closely to stay with the reference.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8, beta = 0.1; with TRL's constant 1.
    """
    ratios = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    losses = torch.sigmoid(beta * ratios[0]) + torch.sigmoid(-beta * (ratios[0] - ratios[1]))
    return Scored(losses, pair_metrics(*ratios, beta, (chosen.total, rejected.total)))


@loss(learning_rate=5e-6)
def nca_pair(
    chosen: Logps, rejected: Logps, ref_chosen: Logps, ref_rejected: Logps, *, beta: NonNegative = 0.01
) -> Scored:
    """NCA: each completion told from noise by itself, so that chosen does not fall with rejected.

    loss = −log σ(r_chosen) − ½ log σ(−r_chosen) − ½ log σ(−r_rejected),  r = beta · log p/p_ref

    beta: how closely to stay with the reference.

    Source: Chen et al. 2024, arXiv:2402.05369, for pairs, beta = 0.01; the paper trained adapters, at this very rate.
    """
    ratios = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    up, down = beta * ratios[0], beta * ratios[1]
    losses = -F.logsigmoid(up) - 0.5 * F.logsigmoid(-up) - 0.5 * F.logsigmoid(-down)
    return Scored(losses, pair_metrics(*ratios, beta, (chosen.total, rejected.total)))


@loss(learning_rate=5e-6)
def sppo_hard(
    chosen: Logps, rejected: Logps, ref_chosen: Logps, ref_rejected: Logps, *, beta: Positive = 1e-3
) -> Scored:
    """SPPO with hard labels: the log ratio of chosen drawn to ½ / beta, that of rejected to −½ / beta.

    loss = (log p/p_ref(chosen) − ½ / beta)² + (log p/p_ref(rejected) + ½ / beta)²

    beta: how closely to stay with the reference; 1/η of the paper.

    The paper iterates, and has a model of preferences estimate the chance of winning; here it is 1 and 0.
    Source: Wu et al. 2024, arXiv:2405.00675, equation 4.7, η = 1,000.
    """
    ratios = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    losses = (ratios[0] - 0.5 / beta).square() + (ratios[1] + 0.5 / beta).square()
    return Scored(losses, pair_metrics(*ratios, beta, (chosen.total, rejected.total)))
