"""Every loss that TRL has, equal to TRL's own code on the same log-probs.

TRL computes its losses inside its trainers. They run here on a model that returns the log-probs of the drawn data
whatever it is asked; what they do with them is theirs.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lite.loss import registry
from lite.loss.logps import Logps
from tests.loss.draws import Data, defaults, draw

pytest.importorskip("trl", minversion="1.16")

COUNT, PROMPT = 6, 2
F_DIVERGENCES = {
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},  # TRL's is 1 − the paper's
}
# ours, our options, TRL's loss type, TRL's options
PAIRWISE = [
    ("dpo", {}, "sigmoid", {}),
    ("dpo", {"variant": "hinge"}, "hinge", {}),
    ("dpo", {"variant": "discopop", "temperature": 0.3}, "discopop", {"discopop_tau": 0.3}),
    ("dpo", {"length_normalised": True, "beta": 2.0}, "sigmoid_norm", {}),
    *(
        ("dpo", {**extra, "f_divergence": divergence, "f_alpha": 0.3}, kind, options)
        for divergence, options in F_DIVERGENCES.items()
        for kind, extra in (
            ("sigmoid", {}),
            ("hinge", {"variant": "hinge"}),
            ("discopop", {"variant": "discopop"}),
            ("sigmoid_norm", {"length_normalised": True}),
        )
    ),
    ("robust", {"label_smoothing": 0.2}, "robust", {}),
    ("exo_pair", {"label_smoothing": 0.2}, "exo_pair", {}),
    ("exo_pair", {}, "exo_pair", {}),
    ("ipo", {}, "ipo", {}),
    ("ipo", {"beta": 0.5}, "ipo", {}),
    ("nca_pair", {}, "nca_pair", {}),
    ("sppo_hard", {}, "sppo_hard", {}),
    ("sppo_hard", {"beta": 0.1}, "sppo_hard", {}),
    ("apo_zero", {}, "apo_zero", {}),
    ("apo_down", {}, "apo_down", {}),
    ("aot", {}, "aot", {}),
    ("aot", {"label_smoothing": 0.2}, "aot", {}),
    ("aot", {"variant": "unpaired", "beta": 0.3}, "aot_unpaired", {}),
    ("aot", {"variant": "unpaired", "label_smoothing": 0.2}, "aot_unpaired", {}),
    ("bco_pair", {"reward_shift": False, "beta": 0.3}, "bco_pair", {}),
    ("wpo", {}, "sigmoid", {"use_weighting": True}),
    ("ld_dpo", {}, "sigmoid", {"ld_alpha": 0.5}),
    ("ld_dpo", {"alpha": 0.0}, "sigmoid", {"ld_alpha": 0.0}),
    ("ld_dpo", {"alpha": 0.8}, "sigmoid", {"ld_alpha": 0.8}),
]


class Fixed(torch.nn.Module):
    """A model in TRL's eyes: its fused head's outputs, one record for each first token id."""

    is_gradient_checkpointing = False

    def __init__(self, outputs: dict[int, SimpleNamespace]) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return self.outputs[int(input_ids[0, 0])]


def padded(records: list[Logps]) -> Tensor:
    """Tokens of several records, one completion a row, after a prompt; zeros elsewhere, as TRL's head gives them."""
    rows = [row for record in records for row in record.tokens.split(record.length.tolist())]
    length = max(map(len, rows)) + PROMPT
    return torch.stack([torch.nn.functional.pad(row, (PROMPT - 1, length - PROMPT - len(row))) for row in rows])


def head(policy: list[Logps], purity: list[Logps] | None = None) -> SimpleNamespace:
    log_probs = padded(policy)
    return SimpleNamespace(
        log_probs=log_probs,
        log_sum_sq_probs=padded(purity or policy),
        entropy=torch.zeros_like(log_probs),
        mean_logits=torch.zeros_like(log_probs),
        is_top1=log_probs > 1,
        aux_loss=None,
    )


def inputs(records: list[Logps], first: int, prefix: str = "") -> dict[str, Tensor]:
    """Token ids of which only the first matters, and where completions are: after the prompt."""
    lengths = torch.cat([record.length for record in records])
    place = torch.arange(int(lengths.max()) + PROMPT)
    mask = ((place >= PROMPT) & (place < PROMPT + lengths[:, None])).long()
    ids = torch.full_like(mask, first)
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask, f"{prefix}completion_mask": mask}


def trainer(policy: Fixed, reference: Fixed, **settings: object) -> SimpleNamespace:
    """What the two trainers' loss methods read of themselves."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    arguments = SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=settings.pop("discopop_tau", 0.05))
    base = {
        "model": policy,
        "ref_model": reference,
        "accelerator": accelerator,
        "args": arguments,
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**{**base, **settings})


def equal(ours: dict[str, Tensor], theirs: dict[str, list[float]], names: set[str]) -> None:
    for name in names:
        assert ours[name].nanmean().item() == pytest.approx(theirs[name][0], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(("name", "options", "kind", "settings"), PAIRWISE)
def test_pairwise_losses(name: str, options: dict[str, object], kind: str, settings: dict[str, object]) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    loss = registry.find(name)
    data, chosen = draw(loss.signature, COUNT, seed=3, dtype=torch.float32), {**defaults(loss.signature), **options}
    if name == "wpo":  # TRL's weights are not bounded by 1: compare where no pair's is
        for role in ("chosen", "rejected"):
            data[f"{role}_purity"] = Logps(data[role].tokens - data[f"{role}_purity"].tokens / 3, data[role].offsets)
    both = [data["chosen"], data["rejected"]]
    purity = [data["chosen_purity"], data["rejected_purity"]] if name == "wpo" else None
    policy = Fixed({0: head(both, purity)})
    reference = Fixed({0: head([data["ref_chosen"], data["ref_rejected"]])})
    base = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "use_weighting": False}
    base |= {"loss_types": [kind], "loss_weights": [1.0], "beta": chosen["beta"]}
    base |= {"label_smoothing": chosen.get("label_smoothing", 0.0)}
    theirs = trainer(policy, reference, **{**base, **settings})
    expected = DPOTrainer._compute_loss(theirs, policy, inputs(both, 0), False)
    scored = loss(data, chosen)
    assert scored.loss.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    rewards = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
    weighed = name == "ld_dpo" and chosen["alpha"] < 1  # TRL logs the weighed logps
    equal(
        scored.metrics, theirs._metrics["train"], rewards | (set() if weighed else {"logps/chosen", "logps/rejected"})
    )


@pytest.mark.parametrize("alpha", [1.0, 0.005])
def test_rpo_is_dpo_and_sft(alpha: float) -> None:
    """TRL averages the likelihood over all tokens at once, so the completions are of one length here."""
    from trl.trainer.dpo_trainer import DPOTrainer

    loss = registry.find("rpo")
    offsets = torch.arange(0, 4 * COUNT + 1, 4)
    tokens = -torch.rand(4, 4 * COUNT, generator=torch.Generator().manual_seed(1))
    data = {role: Logps(row, offsets) for role, row in zip(loss.signature.data, tokens, strict=True)}
    both = [data["chosen"], data["rejected"]]
    policy, reference = Fixed({0: head(both)}), Fixed({0: head([data["ref_chosen"], data["ref_rejected"]])})
    theirs = trainer(policy, reference, ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False, beta=0.1)
    theirs.loss_types, theirs.loss_weights = ["sigmoid", "sft"], [1.0, alpha]
    expected = DPOTrainer._compute_loss(theirs, policy, inputs(both, 0), False)
    assert loss(data, {"beta": 0.1, "alpha": alpha}).loss.mean().item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.4)])
@pytest.mark.parametrize("kl_above_0", [True, False])
def test_kto(weights: tuple[float, float], kl_above_0: bool) -> None:
    from trl.trainer.kto_trainer import KTOTrainer

    loss = registry.find("kto")
    data: Data = draw(loss.signature, COUNT, seed=3, dtype=torch.float32)
    data["ref_kl"] = Logps(data["kl"].tokens + (-0.3 if kl_above_0 else 0.3), data["kl"].offsets)
    policy = Fixed({0: head([data["completion"]]), 1: head([data["kl"]])})
    reference = Fixed({0: head([data["ref_completion"]]), 1: head([data["ref_kl"]])})
    theirs = trainer(policy, reference, calculate_KL=True, loss_type="kto", beta=0.1)
    theirs.desirable_weight, theirs.undesirable_weight = weights
    theirs._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(theirs, model, batch)
    batch = {**inputs([data["completion"]], 0), **inputs([data["kl"]], 1, "KL_"), "label": data["label"]}
    expected = KTOTrainer._compute_loss(theirs, policy, batch, False)
    options = {"beta": 0.1, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    scored = loss(data, options)
    assert (scored.metrics["kl"][0].item() > 0) is kl_above_0
    assert scored.loss.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl"}
    equal(scored.metrics, theirs._metrics["train"], names)


def test_losses_without_a_reference() -> None:
    """ORPO's odds ratio, CPO's and SimPO's preference term; the likelihood is added by their trainers elsewhere."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    loss = registry.find("orpo")
    data = draw(loss.signature, COUNT, dtype=torch.float32)
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    means = data["chosen"].mean, data["rejected"].mean
    odds, *_ = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.1, accelerator=accelerator), *means)
    scored = loss(data, {"beta": 0.1, "nll_over": "completion"})
    assert torch.allclose(scored.loss, scored.metrics["nll_loss"] - odds, rtol=1e-5)

    theirs = SimpleNamespace(alpha=0.0, beta=2.0, label_smoothing=0.0, simpo_gamma=0.7, accelerator=accelerator)
    expected, *_ = CPOTrainer.cpo_loss(SimpleNamespace(loss_type="simpo", **vars(theirs)), *means)
    assert torch.allclose(registry.find("simpo")(data, {"beta": 2.0, "gamma": 0.7}).loss, expected, rtol=1e-5)

    totals = data["chosen"].total, data["rejected"].total
    expected, *_ = CPOTrainer.cpo_loss(SimpleNamespace(loss_type="sigmoid", **vars(theirs)), *totals)
    scored = registry.find("cpo")(data, {"beta": 2.0, "alpha": 0.3})
    assert torch.allclose(scored.loss, expected + 0.3 * scored.metrics["nll_loss"], rtol=1e-5)
