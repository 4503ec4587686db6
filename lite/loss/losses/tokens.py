"""DPO that looks into a pair's tokens: how likely they are to the policy, and which of them both completions have."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lite.loss.logps import Logps
from lite.loss.registry import Fraction, NonNegative, Scored, loss
from lite.loss.rewards import log_ratio, pair_metrics


@loss(learning_rate=1e-5)
def wpo(
    chosen: Logps,
    rejected: Logps,
    ref_chosen: Logps,
    ref_rejected: Logps,
    chosen_purity: Logps,
    rejected_purity: Logps,
    *,
    beta: NonNegative = 0.01,
) -> Scored:
    """WPO: DPO with pairs weighed by how likely the policy itself would be to write them.

    loss = −w · log σ(beta · (log p/p_ref(chosen) − log p/p_ref(rejected)))

    w = min(1, w(chosen) · w(rejected)), constant,  w(y) = exp(mean over tokens of log p(token) − log Σ p²)

    beta: how closely to stay with the reference.

    Σ p² over the vocabulary is the probability that a token sampled from the policy has on average, so that what the
    policy writes itself weighs about 1. The bound at 1 is that of the authors' code; TRL 1.16 has none.
    Source: Zhou et al. 2024, arXiv:2406.11827, equation 2, beta = 0.01.
    """
    ratios = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    alignment = (
        log_ratio(chosen, chosen_purity) / chosen.length + log_ratio(rejected, rejected_purity) / rejected.length
    )
    weight = alignment.detach().clamp(max=0).exp()
    losses = -weight * F.logsigmoid(beta * (ratios[0] - ratios[1]))
    metrics = pair_metrics(*ratios, beta, (chosen.total, rejected.total), {"policy_weights": weight})
    return Scored(losses, metrics)


@loss(learning_rate=5e-6, by_token=True)
def ld_dpo(
    chosen: Logps,
    rejected: Logps,
    ref_chosen: Logps,
    ref_rejected: Logps,
    *,
    beta: NonNegative = 0.1,
    alpha: Fraction = 0.5,
) -> Scored:
    """LD-DPO: DPO in which the tokens that make one completion the longer count less.

    loss = −log σ(beta · (s(chosen) − s(rejected))),  s = Σ over tokens of a · log p/p_ref(token)

    a = 1 for the first min(length chosen, length rejected) tokens of each, alpha beyond

    beta: how closely to stay with the reference.
    alpha: weight of the tokens beyond the shorter one's length; 1 is DPO, 0 leaves them out.

    Rewards are beta · s, as in TRL; logps/* are of whole completions, where TRL logs them weighed.
    Source: Liu et al. 2024, arXiv:2409.06411; alpha = 0.5 as TRL reads the paper, which tunes it per model.
    """
    shared = torch.minimum(chosen.length, rejected.length)
    scores = _desensitised(chosen, ref_chosen, shared, alpha), _desensitised(rejected, ref_rejected, shared, alpha)
    losses = -F.logsigmoid(beta * (scores[0] - scores[1]))
    return Scored(losses, pair_metrics(*scores, beta, (chosen.total, rejected.total)))


def _desensitised(policy: Logps, reference: Logps, shared: Tensor, alpha: float) -> Tensor:
    """The log ratio with tokens from the `shared`-th (P,) of each completion on weighed by alpha, (P,)."""
    place = torch.arange(len(policy.tokens), device=policy.tokens.device)  # (N,)
    owner = torch.bucketize(place, policy.offsets[1:], right=True)  # (N,)
    within = place - policy.offsets[owner] < shared[owner]  # (N,)
    ratio = policy.tokens - reference.tokens
    return Logps(torch.where(within, ratio, alpha * ratio), policy.offsets).total
