"""Losses without a reference: the likelihood itself, and what pairs say about it."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lite.loss.logps import Logps
from lite.loss.registry import NonNegative, Scored, loss
from lite.loss.rewards import pair_metrics


@loss(learning_rate=5e-5, prompt_when={"nll_over": "sequence"})
def orpo(
    chosen: Logps,
    rejected: Logps,
    prompt: Logps | None = None,
    *,
    beta: NonNegative = 0.1,
    nll_over: Literal["completion", "sequence"] = "completion",
) -> Scored:
    """ORPO: the likelihood of chosen, and the odds of chosen against rejected; no reference model.

    loss = NLL(chosen) − beta · log σ(log odds(chosen) − log odds(rejected)),  odds(y) = p / (1 − p), log p = mean logp

    beta: weight of the odds-ratio term; the paper's λ.
    nll_over: tokens of the NLL: the chosen completion's, as in the paper, or prompt and completion, as TRL does.

    The NLL is averaged over these tokens, then over pairs (TRL averages once, over all tokens of its micro-batch).
    Source: Hong et al. 2024, arXiv:2403.07691, equations 6 and 7, λ = 0.1. The paper's rates (5e-6 … 8e-6) are for all
    weights; adapters take about ten times that.
    """
    log_odds = (chosen.mean - rejected.mean) - (log1mexp(chosen.mean) - log1mexp(rejected.mean))
    log_ratio = F.logsigmoid(log_odds)
    nll = -chosen.mean
    if nll_over == "sequence":
        nll = -(prompt.total + chosen.total) / (prompt.length + chosen.length)
    metrics = {"nll_loss": nll, "log_odds_ratio": log_ratio, "log_odds_chosen": log_odds}
    logps = chosen.mean, rejected.mean
    return Scored(nll - beta * log_ratio, pair_metrics(*logps, beta, logps, metrics))


@loss(learning_rate=2e-4, weigh_by="tokens")
def sft(completion: Logps) -> Scored:
    """SFT: the likelihood of the completion, averaged over the tokens of the batch; no reference model.

    loss = −mean logp(completion), weighted by its tokens

    The rate is that of adapters in Schulman et al. 2025, "LoRA without regret": about ten times that of all weights.
    """
    return Scored(-completion.mean, {"nll_loss": -completion.mean.detach()})


@loss(learning_rate=1e-5)
def simpo(chosen: Logps, rejected: Logps, *, beta: NonNegative = 2.0, gamma: float = 1.0) -> Scored:
    """SimPO: mean-logp margin with a target gap; no reference model.

    loss = −log σ(beta · (mean logp chosen − mean logp rejected) − gamma)

    beta: preference strength.
    gamma: the gap that chosen must win by, in the units of beta · logp: the paper's γ, not γ/β.

    Source: Meng et al. 2024, arXiv:2405.14734, equation 6, β = 2.0 … 2.5, γ = 0.3 … 1.6. Rates: as for orpo.
    """
    margin = beta * (chosen.mean - rejected.mean) - gamma
    logps = chosen.mean, rejected.mean
    return Scored(-F.logsigmoid(margin), pair_metrics(*logps, beta, logps))


@loss(learning_rate=1e-5)
def cpo(chosen: Logps, rejected: Logps, *, beta: NonNegative = 0.1, alpha: float = 1.0) -> Scored:
    """CPO: DPO with a uniform reference, and the likelihood of chosen; no reference model.

    loss = −log σ(beta · (logp chosen − logp rejected)) + alpha · NLL(chosen)

    beta: preference strength.
    alpha: weight of the NLL of chosen, averaged over its tokens.

    Source: Xu et al. 2024, arXiv:2401.08417, equations 4 to 6; the paper has alpha = 1. Rates: as for orpo.
    """
    preference = -F.logsigmoid(beta * (chosen.total - rejected.total))
    metrics = {"nll_loss": -chosen.mean}
    logps = chosen.total, rejected.total
    return Scored(preference - alpha * chosen.mean, pair_metrics(*logps, beta, logps, metrics))


def log1mexp(logp: Tensor) -> Tensor:
    """log(1 − p) for logp = log p ≤ 0, exact for p near 0 and near 1, finite with a finite gradient at p = 1.

    Two formulas, each where it loses nothing: Mächler 2012, "Accurately computing log(1 − exp(−|a|))", equation 7.
    """
    # where() differentiates both branches, so neither may see a value at which its own slope is infinite.
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    near_one = logp > -math.log(2)
    inside = torch.where(near_one, logp, -1.0)
    outside = torch.where(near_one, -1.0, logp)
    return torch.where(near_one, torch.log(-torch.expm1(inside)), torch.log1p(-torch.exp(outside)))
