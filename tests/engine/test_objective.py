"""Every loss, with its reference, in any layout: the same step; sums of losses; metrics of some examples only."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lite import signatures
from lite.attention.branch_attention import install
from lite.data.examples import TokenExample
from lite.data.packing import lay_out
from lite.data.packs import Layout
from lite.engine import layout as layouts
from lite.engine.forward import Path
from lite.engine.objective import Objective
from lite.engine.score import logps
from lite.engine.step import backward, measure, total
from lite.loss.logps import Logps
from lite.recipe import Recipe

VOCABULARY = 199  # of the tiny models' words, those that the reference speaks of
WORDS = 5
EVERY = list(signatures.registered())


class FromContent:
    """A reference that nobody computed: numbers that follow from the tokens alone."""

    def draw(self, example: TokenExample, completion: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((example.prompt, example.completions[completion])) % 2**31)

    def logps(self, example: TokenExample, completion: int) -> Tensor:
        length = len(example.completions[completion])
        return -3 * torch.rand(length, generator=self.draw(example, completion), dtype=torch.float64)

    def top(self, example: TokenExample, completion: int) -> tuple[Tensor, Tensor]:
        length = len(example.completions[completion])
        logits = 3 * torch.randn(length, VOCABULARY, generator=self.draw(example, completion), dtype=torch.float64)
        return torch.log_softmax(logits, 1).topk(WORDS)


def fitting(signature: signatures.Signature, pairs: list[TokenExample]) -> list[TokenExample]:
    """The pairs as examples of the loss's type: with margins, with labels and another row's completion, or single."""
    if signature.example == "preference":
        return [replace(e, margin=1.0 + i) for i, e in enumerate(pairs)]
    count, labelled = len(signature.completions), "label" in signature.data
    return [
        TokenExample(e.prompt, e.completions[:count], e.place, e.weight, label=i % 3 > 0 if labelled else None)
        for i, e in enumerate(pairs)
    ]


def step_of(model, recipe: Recipe, examples: list[TokenExample], **changes: object) -> tuple[Tensor, list[Tensor]]:
    """Loss, the model's gradient and the scalars', of one batch."""
    layout = replace(layouts.layout_of(recipe, model), **changes)
    install(model, padded=layout.padded)
    model.zero_grad()
    starts = {name: float(recipe.hyperparameters[name]) for name in recipe.signature.learnable}
    scalars = {name: torch.tensor(start, dtype=torch.float64, requires_grad=True) for name, start in starts.items()}
    objective = Objective.of(recipe.signature, recipe.hyperparameters, scalars)
    found = backward(model, lay_out(examples, layout, reference=FromContent()), objective, Path(13))
    return found.loss, [p.grad.clone() for p in model.parameters()] + [s.grad for s in scalars.values()]


def assert_same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    assert float(one[0]) == pytest.approx(float(other[0]), rel=1e-9)
    total_norm = torch.stack([g.norm() for g in one[1]]).norm()
    assert total_norm > 0
    difference = torch.stack([(a - b).norm() for a, b in zip(one[1], other[1], strict=True)]).norm()
    assert float(difference / total_norm) <= 1e-9


@pytest.mark.parametrize("method", EVERY)
def test_every_loss_takes_the_same_step_in_any_layout(tiny_model, token_examples, method: str) -> None:
    """Packed whole, in small packs, padded, split by completions, and in another order: fp64, 1e-9."""
    model = tiny_model("qwen3", dtype=torch.float64)
    recipe = Recipe(method=method, ref="teacher" if method == "distill" else None)
    examples = fitting(recipe.signature, token_examples())
    whole = step_of(model, recipe, examples, tokens_per_pack=100_000)
    layouts_of_it = [{"tokens_per_pack": 90}, {"padded": True}, {"tokens_per_pack": 1, "split_pairs": True}]
    for changes in layouts_of_it:
        assert_same(whole, step_of(model, recipe, examples, **changes))
    assert_same(whole, step_of(model, recipe, examples[::-1], tokens_per_pack=90))


def test_a_sum_is_each_loss_by_its_own_normaliser(tiny_model, token_examples) -> None:
    """dpo:1.0,sft:0.2: DPO's mean over pairs, and 0.2 times the mean NLL of all chosen completions' tokens."""
    model, examples = tiny_model("qwen3", dtype=torch.float64), token_examples()
    both = Recipe(method="dpo", loss="dpo:1.0,sft:0.2", **{"dpo.beta": 0.3})
    summed = step_of(model, both, examples, tokens_per_pack=60)
    dpo = step_of(model, Recipe(method="dpo", beta=0.3), examples)
    chosen = [TokenExample(e.prompt, e.completions[:1], e.place) for e in examples]
    sft = step_of(model, Recipe(method="sft"), chosen)
    assert float(summed[0]) == pytest.approx(float(dpo[0]) + 0.2 * float(sft[0]), rel=1e-9)
    expected = [a + 0.2 * b for a, b in zip(dpo[1], sft[1], strict=True)]
    assert_same(summed, (summed[0], expected))


def test_packs_and_batches_add_up_to_the_whole(tiny_model, token_examples) -> None:
    """An evaluation in batches gives the averages over all rows, a metric of some rows over those that have it."""
    model = tiny_model("qwen3", dtype=torch.float64)
    install(model)
    recipe = Recipe(method="kto")
    examples = fitting(recipe.signature, token_examples())
    layout = layouts.layout_of(recipe, model)
    objective = Objective.of(recipe.signature, recipe.hyperparameters)
    batch = lay_out(examples, layout, reference=FromContent())
    sums, data = measure(model, batch, objective, Path())
    rewards = recipe.hyperparameters["beta"] * (data["completion"].total - data["ref_completion"].total)
    for name, kind in (("rewards/chosen", True), ("rewards/rejected", False)):
        mean = rewards[data["label"] == kind].mean()
        assert float(sums.averages[name]) == pytest.approx(float(mean), rel=1e-6)
    assert float(total([sums, sums]).averages["rewards/chosen"]) == pytest.approx(
        float(sums.averages["rewards/chosen"])
    )


@pytest.mark.parametrize(
    "layout", [{}, {"tokens_per_pack": 60}, {"padded": True}, {"tokens_per_pack": 1, "split_pairs": True}], ids=str
)
def test_dpo_begins_at_ln_2(tiny_model, token_examples, layout: dict) -> None:
    """The policy's own log-probs as the reference, packed as it pleases: loss ln 2, every |reward| ≤ 1e-4 in fp32."""
    model, examples = tiny_model("qwen3"), token_examples()
    recipe = Recipe(method="dpo")
    install(model)
    ours = logps(model, examples, Layout(("chosen", "rejected"), tokens_per_pack=100_000), Path())

    class Own:
        def logps(self, example: TokenExample, completion: int) -> Tensor:
            i = next(i for i, other in enumerate(examples) if other is example)
            found = ours[("chosen", "rejected")[completion]]
            return found.tokens[found.offsets[i] : found.offsets[i + 1]]

    made = replace(layouts.layout_of(recipe, model), **layout)
    install(model, padded=made.padded)
    sums, _ = measure(
        model, lay_out(examples, made, reference=Own()), Objective.of(recipe.signature, recipe.hyperparameters), Path()
    )
    assert float(sums.loss) == pytest.approx(math.log(2), abs=1e-5)
    assert abs(float(sums.averages["rewards/chosen"])) <= 1e-4
    assert abs(float(sums.averages["rewards/rejected"])) <= 1e-4


class Waits(TorchDispatchMode):
    """Notes every copy of a number between the host and the device: on CUDA each waits for all work before it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        devices = {t.device.type for t in (*arguments, found) if isinstance(t, Tensor)}
        if len(devices) > 1 and not (keywords or {}).get("non_blocking"):
            self.seen.append(str(function))
        return found


@pytest.mark.parametrize("changes", [{"method": "dpo"}, {"method": "gamma_dpo"}, {"loss": "dpo:1,orpo:0.1"}], ids=str)
def test_a_pack_waits_for_no_device(changes: dict) -> None:
    """The loss of a pack is queued behind its forward, whatever the device is; here one that computes nothing."""
    recipe = Recipe(**{"method": "dpo", **changes})
    objective = Objective.of(recipe.signature, recipe.hyperparameters)
    offsets = torch.tensor([0, 3, 5], device="meta")
    data = {name: Logps(torch.empty(5, device="meta"), offsets) for name in recipe.signature.data}
    with Waits() as waits:
        sums = objective(data, {"examples": torch.empty(2, dtype=torch.float64, device="meta")})
    assert sums.loss.device.type == "meta"
    assert waits.seen == []
