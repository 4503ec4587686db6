"""KTO: learning from single completions that are marked desirable or not."""

import math

import torch
from torch import Tensor

from lite.loss.logps import Logps
from lite.loss.registry import NonNegative, Scored, loss
from lite.loss.rewards import log_ratio


@loss(learning_rate=5e-5, whole_batch=True)
def kto(
    completion: Logps,
    kl: Logps,
    ref_completion: Logps,
    ref_kl: Logps,
    label: Tensor,
    *,
    beta: NonNegative = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Scored:
    """KTO: single completions marked desirable or not, against a reference point.

    desirable: loss = desirable_weight · (1 − σ(beta · (log p/p_ref(completion) − z)))

    undesirable: loss = undesirable_weight · (1 − σ(beta · (z − log p/p_ref(completion))))

    z = max(0, mean over the batch of log p/p_ref of another row's completion after this prompt), constant

    beta: how closely to stay with the reference.
    desirable_weight: weight of a desirable row, to make up for there being few of them.
    undesirable_weight: weight of an undesirable row, likewise.

    z estimates the KL from the reference, and gets no gradient. A metric of one kind is NaN for the other kind's rows;
    rewards/margins is the batch's mean reward of the desirable minus that of the others, rewards/accuracies how often a
    row is on its side of z, kl is z itself.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, equation 7 as TRL counts, beta = 0.1; rate 5e-6 for all weights.
    """
    ratio = log_ratio(completion, ref_completion)
    point = log_ratio(kl, ref_kl).detach().mean().clamp(min=0)
    desirable = label.to(ratio.dtype)
    side = (2 * desirable - 1) * (ratio - point)
    weight = desirable_weight * desirable + undesirable_weight * (1 - desirable)
    return Scored(weight * torch.sigmoid(-beta * side), _metrics(beta * ratio, completion.total, label, side, point))


def _metrics(reward: Tensor, logps: Tensor, label: Tensor, side: Tensor, point: Tensor) -> dict[str, Tensor]:
    chosen, rejected = torch.where(label, reward, math.nan), torch.where(label, math.nan, reward)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (side > 0).to(reward.dtype),
        "rewards/margins": (chosen.nanmean() - rejected.nanmean()).expand_as(reward),
        "logps/chosen": torch.where(label, logps, math.nan),
        "logps/rejected": torch.where(label, math.nan, logps),
        "kl": point.expand_as(reward),
    }
    return {name: value.detach() for name, value in metrics.items()}
