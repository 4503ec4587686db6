"""DPO, and the losses of the same difference: by how much more chosen gained on the reference than rejected did."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lite.loss.logps import Logps
from lite.loss.registry import BelowHalf, Fraction, InsideHalf, NonNegative, Positive, Scored, loss
from lite.loss.rewards import log_ratio, pair_metrics

LARGEST_EXPONENT = 80.0  # e^80 is a number in fp32 and in bf16, e^89 is not


@loss(learning_rate=1e-5, only_when={"f_alpha": ("f_divergence", "alpha"), "temperature": ("variant", "discopop")})
def dpo(
    chosen: Logps,
    rejected: Logps,
    ref_chosen: Logps,
    ref_rejected: Logps,
    *,
    beta: NonNegative = 0.1,
    variant: Literal["sigmoid", "hinge", "discopop"] = "sigmoid",
    label_smoothing: BelowHalf = 0.0,
    length_normalised: bool = False,
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl",
    f_alpha: Fraction = 0.5,
    temperature: Positive = 0.05,
) -> Scored:
    """DPO: chosen against rejected, each measured from the reference.

    loss = (1 − ε) · ℓ(x) + ε · ℓ(−x),  x = beta · (s(chosen) − s(rejected)),  s = f′(p/p_ref),  ε = label_smoothing

    ℓ(x) = −log σ(x) (sigmoid), max(0, 1 − x) (hinge), −(1 − m) · log σ(x) + m · e⁻ˣ, m = σ(x / temperature) (discopop)

    f′(t) = log t (reverse_kl), 1 − 1/t (forward_kl), log 2t/(1 + t) (js), (1 − t^−f_alpha) / f_alpha (alpha)

    beta: how closely to stay with the reference.
    variant: what is made of the difference; the papers of hinge and discopop have beta = 0.05.
    label_smoothing: how often a pair's labels are wrong (conservative DPO).
    length_normalised: divide each score by its completion's tokens; takes a larger beta, 5 in Tülu 3.
    f_divergence: the divergence from the reference that is kept small; reverse_kl is DPO.
    f_alpha: of f_divergence alpha; towards 0 it becomes reverse_kl, at 1 it is forward_kl.
    temperature: of discopop, how sharply it turns from one loss to the other.

    At policy = reference the loss of sigmoid is log 2, and discopop's slope leads against chosen, as published.
    Exponents are held at 80: the loss is finite everywhere. Rewards are logged before f′ and the length, as in TRL.
    TRL 1.16 does not smooth these labels, its coefficient of alpha is 1 − f_alpha (f_alpha is the paper's α), and its
    forward_kl and discopop overflow.
    Sources: Rafailov et al. 2023, arXiv:2305.18290, equation 7, beta 0.1; smoothing: Mitchell 2023, "A note on DPO with
    noisy preferences", equation 3; hinge: Zhao et al. 2023, arXiv:2305.10425, and Liu et al. 2023, arXiv:2309.06657;
    discopop: Lu et al. 2024, arXiv:2406.08414, equation 5; f-divergences: Wang et al. 2023, arXiv:2309.16240;
    length: Lambert et al. 2024 (Tülu 3), arXiv:2411.15124.
    """
    ratios = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    scores = [_derivative(ratio, f_divergence, f_alpha) for ratio in ratios]
    if length_normalised:
        scores = [score / logps.length for score, logps in zip(scores, (chosen, rejected), strict=True)]
    x = beta * (scores[0] - scores[1])
    losses = (1 - label_smoothing) * _classify(x, variant, temperature)
    if label_smoothing:
        losses = losses + label_smoothing * _classify(-x, variant, temperature)
    return Scored(losses, pair_metrics(*ratios, beta, (chosen.total, rejected.total)))


@loss(learning_rate=1e-5)
def robust(
    chosen: Logps,
    rejected: Logps,
    ref_chosen: Logps,
    ref_rejected: Logps,
    *,
    beta: NonNegative = 0.1,
    label_smoothing: BelowHalf = 0.1,
) -> Scored:
    """Robust DPO: what DPO's loss would be, on average, had no pair's labels been swapped.

    loss = ((1 − ε) · −log σ(x) − ε · −log σ(−x)) / (1 − 2ε),  x = beta · (log p/p_ref(chosen) − log p/p_ref(rejected))

    beta: how closely to stay with the reference.
    label_smoothing: ε, how often a pair's labels are swapped.

    Without bias, hence without a floor: at large x the loss falls below 0 and goes on falling. TRL's default ε is 0.
    Source: Chowdhury et al. 2024, arXiv:2403.00409, ε = 0.1, beta = 0.1.
    """
    ratios = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    x = beta * (ratios[0] - ratios[1])
    clean, flipped = -F.logsigmoid(x), -F.logsigmoid(-x)
    losses = ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return Scored(losses, pair_metrics(*ratios, beta, (chosen.total, rejected.total)))


@loss(learning_rate=1e-5)
def exo_pair(
    chosen: Logps,
    rejected: Logps,
    ref_chosen: Logps,
    ref_rejected: Logps,
    *,
    beta: NonNegative = 0.1,
    label_smoothing: InsideHalf = 1e-3,
) -> Scored:
    """EXO: reverse KL between the policy's preference and the labels', where DPO has the forward.

    loss = q · log(q / (1 − ε)) + (1 − q) · log((1 − q) / ε)

    q = σ(beta · (log p/p_ref(chosen) − log p/p_ref(rejected)))

    beta: how closely to stay with the reference.
    label_smoothing: ε, the labels' own doubt; at 0 the loss would be infinite.

    Source: Ji et al. 2024, arXiv:2402.00856, equation 16, beta = 0.1; ε as in TRL, which puts 1e-3 in place of 0.
    """
    ratios = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    x = beta * (ratios[0] - ratios[1])
    likely = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-label_smoothing))
    unlikely = torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(label_smoothing))
    return Scored(likely + unlikely, pair_metrics(*ratios, beta, (chosen.total, rejected.total)))


@loss(learning_rate=1e-5)
def ipo(chosen: Logps, rejected: Logps, ref_chosen: Logps, ref_rejected: Logps, *, beta: Positive = 0.1) -> Scored:
    """IPO: the difference per token drawn to a finite gap, however certain the labels.

    loss = (mean log p/p_ref(chosen) − mean log p/p_ref(rejected) − 1 / (2 · beta))²

    beta: how closely to stay with the reference; the paper's τ.

    Log ratios are averaged over tokens as in TRL, where the paper's authors confirmed it; the paper's formula sums.
    Source: Azar et al. 2023, arXiv:2310.12036, equation 17.
    """
    ratios = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    gap = ratios[0] / chosen.length - ratios[1] / rejected.length
    return Scored((gap - 1 / (2 * beta)).square(), pair_metrics(*ratios, beta, (chosen.total, rejected.total)))


@loss(learning_rate=5e-6)
def rpo(
    chosen: Logps,
    rejected: Logps,
    ref_chosen: Logps,
    ref_rejected: Logps,
    *,
    beta: NonNegative = 0.1,
    alpha: NonNegative = 1.0,
) -> Scored:
    """RPO: DPO, and the likelihood of chosen, which DPO alone lets fall.

    loss = −log σ(beta · (log p/p_ref(chosen) − log p/p_ref(rejected))) + alpha · NLL(chosen)

    beta: how closely to stay with the reference.
    alpha: weight of the NLL of chosen, averaged over its tokens.

    The NLL is averaged over the pair's own tokens as in the paper; TRL (loss_type sigmoid + sft) averages once, over
    all tokens of its micro-batch. Version 1 of the paper put alpha on the other term.
    Source: Pang et al. 2024, arXiv:2404.19733 (version 3), alpha = 1. Liu et al. 2024, arXiv:2405.16436, have the same
    two terms, alpha = 0.005 and beta = 0.01.
    """
    ratios = log_ratio(chosen, ref_chosen), log_ratio(rejected, ref_rejected)
    metrics = pair_metrics(*ratios, beta, (chosen.total, rejected.total), {"nll_loss": -chosen.mean})
    return Scored(-F.logsigmoid(beta * (ratios[0] - ratios[1])) - alpha * chosen.mean, metrics)


def _derivative(ratio: Tensor, f_divergence: str, alpha: float) -> Tensor:
    """f′(t) at log t = ratio."""
    if f_divergence == "js":
        return math.log(2) + F.logsigmoid(ratio)
    alpha = {"reverse_kl": 0.0, "forward_kl": 1.0}.get(f_divergence, alpha)
    # expm1 keeps the digits that 1 − t^−alpha loses where policy and reference are near each other.
    return -torch.expm1((-alpha * ratio).clamp(max=LARGEST_EXPONENT)) / alpha if alpha else ratio


def _classify(x: Tensor, variant: str, temperature: float) -> Tensor:
    if variant == "hinge":
        return F.relu(1 - x)
    logistic = -F.logsigmoid(x)
    if variant == "sigmoid":
        return logistic
    # m · e⁻ˣ as one exponent: apart, m is 0 and e⁻ˣ infinite where x is far below 0.
    exponential = torch.exp((F.logsigmoid(x / temperature) - x).clamp(max=LARGEST_EXPONENT))
    return torch.sigmoid(-x / temperature) * logistic + exponential
