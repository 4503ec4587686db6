"""One chunk of logits to numbers per token, in place: the logits become the slope d −value / d logits.

For a label's log-probability that is p − onehot(label), and it has two twins. `plain` is torch and runs anywhere; it is
the reference. `liger` is the Triton kernel of Liger-Kernel, which reads the chunk twice and writes it once; it is
launched here rather than through Liger's own function, which copies two counts to the host (a stall in every chunk) and
rounds the losses to the logits' dtype. All else is plain.
"""

import importlib.util
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lite.device import kind

if TYPE_CHECKING:
    from lite.loss.head import Head
    from lite.loss.soft import SoftTargets

Kernel = Literal["auto", "liger", "plain"]
IGNORE = -100  # no label has this value: the kernel demands one to skip


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are kept: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def choose(kernel: Kernel, device: torch.device) -> Kernel:
    """`auto` as the kernel that this device has: Liger's on CUDA where it is installed, else plain."""
    if kernel != "auto":
        return kernel
    return "liger" if kind(device) == "cuda" and importlib.util.find_spec("liger_kernel") else "plain"


def logps_in_place(logits: Tensor, labels: Tensor, head: "Head", *, slope: bool, kernel: Kernel) -> Tensor:
    """Log-probability of each label; if `slope`, logits are overwritten by d nll / d logits (else they may be ruined).

    logits (C, V) fp32 or fp64, before the head's scale and softcap, through which the slope goes as well.
    Returns (C,) in the logits' dtype, nats.
    """
    if _takes_liger(logits, kernel):
        return _liger(logits, labels, head, slope)
    bent = _bend(logits, head, slope=slope)
    logps, total = _logps_of(logits, labels[:, None])
    if slope:
        _slope_of_labels(logits, total, labels)
        _unbend(logits, bent, head)
    return logps.squeeze(1)


def logps_and_purity_in_place(logits: Tensor, labels: Tensor, head: "Head", *, slope: bool) -> tuple[Tensor, Tensor]:
    """Plain `logps_in_place`, and log Σ_v q(v)² of each row, (C,)."""
    bent = _bend(logits, head, slope=slope)
    logps, total = _logps_of(logits, labels[:, None])
    # A norm needs no copy of the chunk for the squares; it is at least 1, for the greatest of the row is exp(0).
    purity = (torch.linalg.vector_norm(logits, dim=1).log() - total.squeeze(1).log()).mul_(2)
    if slope:
        _slope_of_labels(logits, total, labels)
        _unbend(logits, bent, head)
    return logps.squeeze(1), purity


def top_logps_in_place(
    logits: Tensor, labels: Tensor, k: int, head: "Head", *, kernel: Kernel
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each label (C,) as by `logps_in_place`, the k greatest of the row (C, k), and their ids."""
    if _takes_liger(logits, kernel):
        ids = logits.topk(k).indices  # scale and cap, which the kernel applies, keep the order
        wanted = logits.gather(1, torch.cat([labels[:, None], ids], 1))
        _bend(wanted, head, slope=False)
        logps = _liger(logits, labels, head, slope=False)
        log_total = wanted[:, :1] - logps[:, None]
        return logps, wanted[:, 1:] - log_total, ids
    _bend(logits, head, slope=False)
    ids = logits.topk(k).indices
    logps, _ = _logps_of(logits, torch.cat([labels[:, None], ids], 1))
    return logps[:, 0], logps[:, 1:], ids


def soft_logps_in_place(logits: Tensor, targets: "SoftTargets", head: "Head", *, slope: bool) -> Tensor:
    """Σ_k w_k log q(id_k) + w_rest log q_rest of each row, (C,); if `slope`, logits are overwritten by d −that."""
    ids = targets.ids
    bent = _bend(logits, head, slope=slope)
    of_ids = logits.gather(1, ids)
    logits.scatter_(1, ids, -torch.inf)
    # By the rest's own maximum: by the row's, a rest that the ids outweigh a hundred orders would come out empty. The
    # maximum of no words, −inf, would make NaN of −inf − −inf.
    top = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)  # at least 1, or 0 of no words
    events = torch.cat([of_ids, top + total.log()], 1)  # (C, K + 1)
    logps = events - events.logsumexp(1, keepdim=True)
    rest = torch.where(total > 0, targets.rest[:, None], 0)
    weights = torch.cat([targets.weights, rest], 1).to(logits.dtype)
    values = torch.where(weights == 0, 0, weights * logps).sum(1)
    if slope:
        slopes = logps.exp() * weights.sum(1, keepdim=True) - weights  # (C, K + 1), of which each word has its share
        logits.mul_(slopes[:, -1:] / total.clamp(min=1)).scatter_(1, ids, slopes[:, :-1])
        _unbend(logits, bent, head)
    return values


def _takes_liger(logits: Tensor, kernel: Kernel) -> bool:
    return kernel == "liger" and logits.dtype == torch.float32


def _bend(logits: Tensor, head: "Head", *, slope: bool) -> Tensor | None:
    """Scale and cap the logits; if there is a cap and a slope to come, tanh² of them, for `_unbend`."""
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is None:
        return None
    logits.div_(head.softcap).tanh_()
    bent = logits.square() if slope else None
    logits.mul_(head.softcap)
    return bent


def _unbend(slope: Tensor, bent: Tensor | None, head: "Head") -> None:
    """The slope back through cap and scale."""
    if bent is not None:
        slope.mul_(bent.neg_().add_(1))
    if head.scale != 1.0:
        slope.mul_(head.scale)


def _logps_of(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ids (C, J); the logits become exp(logits − maximum), and their sum is the other result."""
    # In place throughout: logsumexp would hide a second copy of the chunk.
    top = logits.amax(1, keepdim=True)
    logps = logits.gather(1, ids).sub_(top)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    return logps.sub_(total.log()), total


def _slope_of_labels(exponentials: Tensor, total: Tensor, labels: Tensor) -> None:
    exponentials.div_(total).scatter_add_(1, labels[:, None], torch.full_like(total, -1.0))


def _liger(logits: Tensor, labels: Tensor, head: "Head", slope: bool) -> Tensor:
    if logits.is_meta:  # a dry run: the kernel allocates nothing
        return torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    import triton
    from liger_kernel.ops import cross_entropy as liger

    if head.scale != 1.0:
        logits.mul_(head.scale)
    rows, vocabulary = logits.shape
    nll = torch.empty(rows, dtype=torch.float32, device=logits.device)
    arguments = {
        "X_ptr": logits,
        "X_stride": logits.stride(0),
        "Y_ptr": labels,
        "Y_stride": labels.stride(0),
        "weight_ptr": None,
        "loss_ptr": nll,
        "z_loss_ptr": None,
        "loss_stride": 1,
        "token_accuracy_ptr": None,
        "token_accuracy_stride": 0,
        "predicted_tokens_ptr": None,
        "predicted_tokens_stride": 0,
        "n_cols": vocabulary,
        "n_non_ignore": rows,
        "sum_non_ignore_weight": float(rows),
        "weight_sum": 0.0,
        "ignore_index": IGNORE,
        "lse_square_scale": 0.0,
        "label_smoothing": 0.0,
        "reduction": "none",
        "softcap": head.softcap,
        "RETURN_Z_LOSS": False,
        "RETURN_TOKEN_ACCURACY": False,
        "RETURN_PREDICTED_TOKENS": False,
        "BLOCK_SIZE": min(32768, triton.next_power_of_2(vocabulary)),
        "HAS_WEIGHT": False,
        "HAS_SOFTCAPPING": head.softcap is not None,
        "HAS_GRADIENTS": slope,
    }
    kernel = liger.liger_cross_entropy_kernel
    # Liger adds arguments from release to release; those it does not know yet are for features that are off here.
    known = set(kernel.arg_names)
    kernel[(rows,)](**{name: value for name, value in arguments.items() if name in known}, num_warps=32)
    if slope and head.scale != 1.0:
        logits.mul_(head.scale)
    return nll.neg_()
