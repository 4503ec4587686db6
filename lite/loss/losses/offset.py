"""DPO with a gap: chosen must win by some margin, the row's own or one that is trained."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lite.loss.logps import Logps
from lite.loss.registry import NonNegative, Scored, loss
from lite.loss.rewards import log_ratio, pair_metrics


@loss(learning_rate=1e-5)
def odpo(
    chosen: Logps,
    rejected: Logps,
    ref_chosen: Logps,
    ref_rejected: Logps,
    margin: Tensor,
    *,
    beta: NonNegative = 0.1,
    alpha: NonNegative = 1.0,
    scale: Literal["log", "linear"] = "log",
) -> Scored:
    """ODPO: DPO with a gap to win by that grows with the row's own `margin`.

    loss = −log σ(beta · (log p/p_ref(chosen) − log p/p_ref(rejected)) − alpha · f(margin)),  f = log or the identity

    beta: how closely to stay with the reference; the paper tunes it per task, from 0.05 to 0.7.
    alpha: weight of the margin; 0 is DPO.
    scale: what is made of the margin, at least 0; by log, a pair with margin 0 teaches nothing.

    TRL has no such loss.
    Source: Amini et al. 2024, arXiv:2402.10571; alpha = 1 and log as in the authors' code.
    """
    ratios = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    margin = margin.to(ratios[0])
    offset = alpha * (margin.log() if scale == "log" else margin) if alpha else 0.0
    losses = -F.logsigmoid(beta * (ratios[0] - ratios[1]) - offset)
    return Scored(losses, pair_metrics(*ratios, beta, (chosen.total, rejected.total)))


@loss(learning_rate=1e-5, learnable={"gamma": (-1.0, 1.0)})
def gamma_dpo(
    chosen: Logps,
    rejected: Logps,
    ref_chosen: Logps,
    ref_rejected: Logps,
    *,
    beta: NonNegative = 0.1,
    gamma: float = 0.5,
) -> Scored:
    """DPO with a trained offset gamma, one bounded number for all pairs.

    loss = −log σ(beta · (log p/p_ref(chosen) − log p/p_ref(rejected)) + gamma)

    beta: how closely to stay with the reference; 0.1 to 0.2.
    gamma: where the trained offset starts.

    Unbounded, gamma → ∞ would bring the loss to 0 while the model learns nothing. Therefore it stays within −1 … 1, and
    the metrics hold it: at its upper bound it has done what it can, and a loss that fell meanwhile says little; judge
    by rewards/margins, in which gamma has no part. Below 0 it is a gap to win by, as in odpo.
    """
    ratios = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    x = beta * (ratios[0] - ratios[1]) + gamma
    held = {"gamma": torch.as_tensor(gamma, dtype=x.dtype, device=x.device).expand_as(x)}
    return Scored(-F.logsigmoid(x), pair_metrics(*ratios, beta, (chosen.total, rejected.total), held))
