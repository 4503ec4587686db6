"""Losses that compare a pair with the rest of its batch; the larger the batch, the better what they estimate."""

from typing import Literal

import torch
import torch.nn.functional as F

from lite.loss.logps import Logps
from lite.loss.registry import BelowHalf, NonNegative, Scored, loss
from lite.loss.rewards import log_ratio, pair_metrics


@loss(learning_rate=1e-5, whole_batch=True)
def aot(
    chosen: Logps,
    rejected: Logps,
    ref_chosen: Logps,
    ref_rejected: Logps,
    *,
    beta: NonNegative = 0.01,
    variant: Literal["paired", "unpaired"] = "paired",
    label_smoothing: BelowHalf = 0.0,
) -> Scored:
    """AOT: chosen above rejected at every quantile of the batch, by optimal transport (sorting).

    loss = −(1 − ε) · log σ(beta · d) − ε · log σ(−beta · d),  d = u − v,  u and v each sorted over the batch

    paired: u = logp chosen − logp rejected,  v = the same of the reference

    unpaired: u = log p/p_ref(chosen),  v = log p/p_ref(rejected)

    beta: how closely to stay with the reference.
    variant: what is compared: the pair's margin with the reference's, or chosen with rejected of any pair.
    label_smoothing: ε, how often a pair's labels are wrong.

    An example's loss is that of the quantile at which its u lies, so that a weight of the row has a meaning.
    Source: Melnyk et al. 2024, arXiv:2406.05882, beta = 0.01. TRL calls them aot and aot_unpaired.
    """
    ratios = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    if variant == "unpaired":
        above, below = ratios
    else:
        above, below = chosen.total - rejected.total, ref_chosen.total - ref_rejected.total
    rank = above.argsort().argsort()
    x = beta * (above - below.sort().values[rank])
    losses = -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)
    return Scored(losses, pair_metrics(*ratios, beta, (chosen.total, rejected.total)))


@loss(learning_rate=5e-6, whole_batch=True)
def bco_pair(
    chosen: Logps,
    rejected: Logps,
    ref_chosen: Logps,
    ref_rejected: Logps,
    *,
    beta: NonNegative = 0.01,
    reward_shift: bool = True,
) -> Scored:
    """BCO: chosen told from rejected by the reward alone, measured from the batch's mean.

    loss = −log σ(r_chosen − δ) − log σ(−(r_rejected − δ)),  r = beta · log p/p_ref,  δ = mean r of the batch, constant

    beta: how closely to stay with the reference.
    reward_shift: whether to subtract δ; without it δ = 0, as in TRL 1.16.

    δ is this batch's own. The paper and TRL before 0.29 keep a running mean over steps: a loss with a memory depends on
    the order of the rows before it, and a resumed run would have to bring the memory along.
    Source: Jung et al. 2024, arXiv:2404.04656, beta = 0.01; without its matching of prompts, for a pair shares one.
    """
    ratios = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    up, down = beta * ratios[0], beta * ratios[1]
    shift = torch.cat([up, down]).mean().detach() if reward_shift else 0.0
    losses = -F.logsigmoid(up - shift) - F.logsigmoid(shift - down)
    return Scored(losses, pair_metrics(*ratios, beta, (chosen.total, rejected.total)))
