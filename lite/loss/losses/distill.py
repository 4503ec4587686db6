"""Distillation: learning what a larger model thinks of every token, from what a cache kept of it."""

from lite.loss.logps import Logps
from lite.loss.registry import Scored, loss
from lite.loss.rewards import log_ratio


@loss(learning_rate=2e-4, weigh_by="tokens")
def distill(expected: Logps, ref_expected: Logps) -> Scored:
    """Distillation: forward KL from the reference's top k words and the mass of the rest.

    loss = mean over tokens of Σ_k p_k · log(p_k / q_k) + p_rest · log(p_rest / q_rest),  p the reference, q the policy

    The words that are not among the reference's k likeliest count as one event. So the policy learns how much falls to
    them, which the top k alone, rescaled to 1, would teach wrongly; and the loss is never above the KL over all words.
    A token weighs the same wherever it stands, as in sft; so does the rate. There is no temperature: the cache holds
    the distribution at 1.
    Source: Hinton et al. 2015, arXiv:1503.02531; on keeping k: Anshumann et al. 2025, arXiv:2503.16870.
    """
    divergence = log_ratio(ref_expected, expected) / expected.length
    return Scored(divergence, {"kl": divergence.detach()})
