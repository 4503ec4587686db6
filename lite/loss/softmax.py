"""One chunk of logits to log-probabilities, in place: the logits become the slope d nll / d logits = p − onehot(label).

Two twins. `plain` is torch and runs anywhere; it is the reference. `liger` is the Triton kernel of Liger-Kernel, which
reads the chunk twice and writes it once; it is launched here rather than through Liger's own function, which copies two
counts to the host (a stall in every chunk) and rounds the losses to the logits' dtype.
"""

import importlib.util
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lite.loss.head import Head

Kernel = Literal["auto", "liger", "plain"]
IGNORE = -100  # no label has this value: the kernel demands one to skip


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are kept: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def choose(kernel: Kernel, device: torch.device) -> Kernel:
    """`auto` as the kernel that this device has: Liger's on CUDA where it is installed, else plain."""
    if kernel != "auto":
        return kernel
    return "liger" if device.type == "cuda" and importlib.util.find_spec("liger_kernel") else "plain"


def logps_in_place(logits: Tensor, labels: Tensor, head: "Head", *, slope: bool, kernel: Kernel) -> Tensor:
    """Log-probability of each label; if `slope`, logits are overwritten by d nll / d logits (else they may be ruined).

    logits (C, V) fp32 or fp64, before the head's scale and softcap, through which the slope goes as well.
    Returns (C,) in the logits' dtype, nats.
    """
    if kernel == "liger" and logits.dtype == torch.float32:
        return _liger(logits, labels, head, slope)
    return _plain(logits, labels, head, slope)


def _plain(logits: Tensor, labels: Tensor, head: "Head", slope: bool) -> Tensor:
    # In place throughout: logsumexp would hide a second copy of the chunk.
    if head.scale != 1.0:
        logits.mul_(head.scale)
    bent = None
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        bent = logits.square() if slope else None
        logits.mul_(head.softcap)
    label = labels[:, None]
    top = logits.amax(1, keepdim=True)
    of_label = logits.gather(1, label).sub_(top)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    logps = of_label.sub_(total.log()).squeeze(1)
    if slope:
        logits.div_(total).scatter_add_(1, label, torch.full_like(total, -1.0))
        if bent is not None:
            logits.mul_(bent.neg_().add_(1))
        if head.scale != 1.0:
            logits.mul_(head.scale)
    return logps


def _liger(logits: Tensor, labels: Tensor, head: "Head", slope: bool) -> Tensor:
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
