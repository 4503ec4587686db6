"""A step does not depend on how it was laid out: the same loss and gradient however the batch is cut up and ordered."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from lite import signatures
from lite.attention.branch_attention import install
from lite.data.examples import TokenExample
from lite.data.packing import lay_out
from lite.data.packs import Layout
from lite.engine.forward import Path
from lite.engine.objective import Objective, Summand
from lite.engine.step import backward, measure
from lite.loss import registry
from lite.loss.logps import Logps
from lite.loss.registry import Loss, Scored
from lite.memory.checkpoint import checkpoint_layers
from lite.model import lora
from lite.model.rotary import regimes

ROLES = ("chosen", "rejected")


def objective(name: str = "orpo", losses: str | None = None, **hyperparameters: object) -> Objective:
    signature = signatures.find(name, losses)
    return Objective.of(signature, {k: h.default for k, h in signature.hyperparameters.items()} | hyperparameters)


def alone(loss: Loss, hyperparameters: dict) -> Objective:
    return Objective((Summand(loss, 1.0, {name: name for name in hyperparameters}),), hyperparameters)


def coupled(chosen: Logps, rejected: Logps, *, beta: float = 0.5) -> Scored:
    """A loss whose examples know each other: each margin against the batch's mean margin."""
    margin = beta * (chosen.mean - rejected.mean)
    return Scored(-torch.nn.functional.logsigmoid(margin - margin.mean().square()), {"margin": margin.detach()})


WHOLE_BATCH = replace(registry.find("orpo").signature, whole_batch=True)
COUPLED = alone(Loss(replace(WHOLE_BATCH, data=ROLES), coupled), {"beta": 0.5})


def outcome(model, examples, objective: Objective, chunk_tokens: int = 100, **layout) -> tuple[Tensor, list[Tensor]]:
    layout = Layout(ROLES, rotary_bound=regimes(model.config).bound, **layout)
    install(model, padded=layout.padded)
    model.zero_grad()
    loss = backward(model, lay_out(examples, layout), objective, Path(chunk_tokens)).loss
    return loss, [p.grad.clone() for p in model.parameters()]


def scores(which: Objective) -> tuple[str, ...] | None:
    return (*ROLES, "prompt") if which.hyperparameters.get("nll_over") == "sequence" else None


def assert_same(one, other, tolerance: float) -> None:
    assert abs(float(one[0] - other[0])) <= tolerance * abs(float(one[0]))
    total = torch.stack([g.norm() for g in one[1]]).norm()
    difference = torch.stack([(a - b).norm() for a, b in zip(one[1], other[1], strict=True)]).norm()
    assert float(difference / total) <= tolerance


LAYOUTS = [
    {"tokens_per_pack": 90}, {"tokens_per_pack": 10}, {"padded": True}, {"padded": True, "tokens_per_pack": 1},
    {"tokens_per_pack": 40, "split_pairs": True}, {"tokens_per_pack": 1, "split_pairs": True},
]  # fmt: skip


# Padded batches run transformers' own attention, which for Gemma 2's cap is the eager one: its softmax is fp32.
IN_FP64 = [
    (a, x) for a in ("qwen3", "gemma2", "phi3-longrope") for x in LAYOUTS if not (a == "gemma2" and "padded" in x)
]
OBJECTIVES = {"orpo": objective(), "sequence": objective(nll_over="sequence"), "coupled": COUPLED}


@pytest.mark.parametrize(("architecture", "layout"), IN_FP64, ids=str)
@pytest.mark.parametrize("which", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_any_layout_gives_the_same_step_in_fp64(
    tiny_model, token_examples, architecture: str, which: Objective, layout: dict
):
    model, examples = tiny_model(architecture, dtype=torch.float64), token_examples()
    whole = outcome(model, examples, which, tokens_per_pack=10_000, scores=scores(which))
    assert_same(whole, outcome(model, examples, which, scores=scores(which), **layout), 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_layout_gives_the_same_step_in_fp32(tiny_model, token_examples, layout: dict):
    model, examples = tiny_model("qwen3"), token_examples()
    assert_same(outcome(model, examples, objective()), outcome(model, examples, objective(), **layout), 1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 13, 10_000])
def test_any_chunk_gives_the_same_step(tiny_model, token_examples, chunk_tokens: int):
    model, examples = tiny_model("qwen3", dtype=torch.float64), token_examples()
    assert_same(outcome(model, examples, objective()), outcome(model, examples, objective(), chunk_tokens), 1e-10)


def test_the_order_inside_a_batch_does_not_matter(tiny_model, token_examples):
    model, examples = tiny_model("qwen3", dtype=torch.float64), token_examples()
    for which in (objective(), COUPLED):
        one = outcome(model, examples, which, tokens_per_pack=90)
        assert_same(one, outcome(model, examples[::-1], which, tokens_per_pack=90), 1e-10)


def test_checkpointing_gives_the_same_step(tiny_model, token_examples):
    model, examples = tiny_model("qwen3", dtype=torch.float64).train(), token_examples()
    plain = outcome(model, examples, objective())
    checkpoint_layers(model)
    assert_same(plain, outcome(model, examples, objective()), 1e-12)


def test_streaming_equals_two_passes(tiny_model, token_examples):
    """ORPO declared `whole_batch` goes through both passes; its gradient is that of streaming."""
    model, examples = tiny_model("qwen3", dtype=torch.float64), token_examples()
    streamed = objective()
    two_pass = alone(Loss(WHOLE_BATCH, streamed.summands[0].loss.function), streamed.hyperparameters)
    assert_same(
        outcome(model, examples, streamed, tokens_per_pack=60),
        outcome(model, examples, two_pass, tokens_per_pack=60),
        1e-10,
    )


@pytest.mark.parametrize("where", ["module", "config"])
def test_two_passes_draw_the_same_dropout(tiny_model, token_examples, where: str):
    """With dropout on, the gradient belongs to the loss that was reported: a step against it lowers that very loss.

    Attention drops by a probability out of the config, and in padded batches only.
    """
    changes, layout = ({"attention_dropout": 0.5}, {"padded": True}) if where == "config" else ({}, {})
    model, examples = tiny_model("qwen3", dtype=torch.float64, **changes), token_examples()
    if where == "module":
        layer = model.model.layers[0].mlp
        layer.down_proj = torch.nn.Sequential(torch.nn.Dropout(0.5), layer.down_proj)
    model.train()
    torch.manual_seed(3)
    loss, gradient = outcome(model, examples, COUPLED, tokens_per_pack=60, **layout)
    with torch.no_grad():
        for parameter, grad in zip(model.parameters(), gradient, strict=True):
            parameter -= 1e-6 * grad
    torch.manual_seed(3)
    after, _ = outcome(model, examples, COUPLED, tokens_per_pack=60, **layout)
    predicted = 1e-6 * float(torch.stack([g.norm() for g in gradient]).norm() ** 2)
    assert float(loss - after) == pytest.approx(predicted, rel=0.1, abs=2e-7)


def test_weights_scale_an_examples_share(tiny_model, token_examples):
    """A row of weight 2 counts as two rows of weight 1."""
    model, (one, two, *_) = tiny_model("qwen3", dtype=torch.float64), token_examples()
    doubled = TokenExample(one.prompt, one.completions, one.place, weight=2.0)
    assert_same(outcome(model, [one, one, two], objective()), outcome(model, [doubled, two], objective()), 1e-10)


def test_sft_is_the_token_mean_of_the_batch(tiny_model, token_examples):
    """However rows are split, the loss is Σ nll of all completion tokens / their number."""
    model = tiny_model("qwen3", dtype=torch.float64)
    examples = [TokenExample(e.prompt, e.completions[:1], e.place) for e in token_examples()]
    install(model)
    for budget in (10_000, 20):
        layout = Layout(("completion",), tokens_per_pack=budget)
        batch = lay_out(examples, layout)
        result, _ = measure(model, batch, objective("sft"), Path())
        total = sum(
            -float(measure(model, lay_out([e], layout), objective("sft"), Path())[0].loss) * -len(e.completions[0])
            for e in examples
        )
        assert float(result.loss) == pytest.approx(total / sum(len(e.completions[0]) for e in examples), rel=1e-6)


def test_measure_reports_what_backward_reports(tiny_model, token_examples):
    model, examples = tiny_model("qwen3"), token_examples()
    install(model)
    batch = lay_out(examples, Layout(ROLES, tokens_per_pack=90))
    one, (other, _) = backward(model, batch, objective(), Path()), measure(model, batch, objective(), Path())
    assert float(one.loss) == pytest.approx(float(other.loss), rel=1e-5)
    assert one.metrics.keys() == other.metrics.keys()
    for name, value in one.averages.items():
        assert float(value) == pytest.approx(float(other.averages[name]), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("which", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("targets", [None, "lm_head"], ids=["blocks", "blocks and head"])
def test_adapters_take_the_same_step_in_any_layout(tiny_model, token_examples, which: Objective, targets: str | None):
    """LoRA on every linear layer of the blocks, and on the head: packs, splits and recomputation change nothing."""
    model, examples = tiny_model("qwen3", dtype=torch.float64), token_examples()
    names = [
        n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]
    config = LoraConfig(r=4, target_modules=[*set(names), *([targets] if targets else [])], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config).train()
    lora.replace_forward(adapted)

    def step(**layout: object) -> tuple[Tensor, list[Tensor]]:
        made = Layout(ROLES, scores=scores(which), **layout)
        install(adapted, padded=made.padded)
        adapted.zero_grad()
        loss = backward(adapted, lay_out(examples, made), which, Path(13)).loss
        return loss, [p.grad.clone() for p in adapted.parameters() if p.requires_grad]

    whole = step(tokens_per_pack=10_000)
    checkpoint_layers(adapted)
    for layout in LAYOUTS:
        assert_same(whole, step(**layout), 1e-10)
