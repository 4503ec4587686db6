"""The implicit reward of a completion, and the metrics of a pair under TRL's names."""

from torch import Tensor

from lite.loss.logps import Logps


def log_ratio(policy: Logps, reference: Logps) -> Tensor:
    """log (p(completion) / p_ref(completion)) of each completion, (B,) nats; times beta it is DPO's implicit reward.

    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 5, without its term of the prompt alone.
    """
    # Token by token: the two totals are thousands of nats, and their fp32 rounding alone would pass for a reward.
    return Logps(policy.tokens - reference.tokens, policy.offsets).total


def pair_metrics(
    chosen: Tensor, rejected: Tensor, beta: float, logps: tuple[Tensor, Tensor], more: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """TRL's names: rewards are beta times what the loss compares; accuracy is how often chosen has more of it.

    chosen, rejected (P,): log ratios to the reference, or logps where a loss has none; logps: what the policy gives
    the two completions; more: the loss's own. All come back detached.
    """
    metrics = {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards/margins": beta * (chosen - rejected),
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
        **(more or {}),
    }
    return {name: value.detach() for name, value in metrics.items()}
