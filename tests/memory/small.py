"""A small model with adapters, real or on meta, and one step of it: plain, and under the meter."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lite.attention.branch_attention import install
from lite.data.examples import Place, TokenExample
from lite.data.packing import lay_out
from lite.data.packs import Batch, Layout, Pack
from lite.engine.forward import Path, placed, scored_tokens
from lite.engine.objective import Objective
from lite.engine.step import backward
from lite.memory import marks
from lite.memory.host import host_tensors
from lite.memory.meter import Meter, frozen_tensors
from lite.model import lora
from lite.model.norms import replace_norms
from tests.architectures import VOCABULARY, tiny_config
from tests.engine.test_step import ROLES, objective
from tests.model.quantised import store_linears

LAYERS = 4
ORPO = objective()
LINEARS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def adapted(
    architecture: str = "qwen3",
    kind: str = "fp32",
    *,
    device: str = "cpu",
    targets: Sequence[str] = LINEARS,
    **changes: object,
) -> PeftModel:
    """Four layers stored as `kind`, with adapters that already do something; the same numbers each time."""
    config = tiny_config(architecture, **{"num_hidden_layers": LAYERS, "tie_word_embeddings": False} | changes)
    with torch.random.fork_rng(), torch.device("meta" if device == "meta" else "cpu"):
        torch.manual_seed(0)
        model = store_linears(AutoModelForCausalLM.from_config(config), kind)
    replace_norms(model)
    with torch.random.fork_rng(), torch.device("meta" if device == "meta" else "cpu"):
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    lora.replace_forward(model)
    install(model)
    return model.to(device).train()


def examples(scale: int = 1) -> list[TokenExample]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((20, 30, 12), (5, 1, 9), (11, 20, 26))

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (count * scale,), generator=generator).tolist())

    return [
        TokenExample(ids(p), (ids(c), ids(r)), Place("pairs.jsonl", row)) for row, (p, c, r) in enumerate(shapes, 1)
    ]


def batch(tokens_per_pack: int = 10_000, scale: int = 1) -> Batch:
    """One pack of 134 tokens, or several."""
    return lay_out(examples(scale), Layout(ROLES, tokens_per_pack=tokens_per_pack))


def step(model: nn.Module, of: Batch, which: Objective = ORPO) -> list[Tensor]:
    """The loss and the gradient of every trained parameter."""
    model.zero_grad()
    loss = backward(model, of, which, Path(chunk_tokens=64)).loss
    return [loss, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def gradients(model: nn.Module, packs: Sequence[Pack]) -> list[Tensor]:
    """Of several packs whose graphs are there at once."""
    model.zero_grad()
    sum(scored_tokens(model, pack, Path()).logps.square().sum() for pack in packs).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def same(these: Sequence[Tensor], those: Sequence[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def metered(model: nn.Module, of: Batch, act: Callable[[Batch], object] | None = None) -> Meter:
    """What a step allocates beyond what is there before it: weights, gradients, packs."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    of = Batch(tuple(placed(of.packs, model)), of.places, of.shares, of.columns, of.scored_tokens)
    meter = Meter(trace=True)
    with meter:
        with marks.on_host():
            meter.hold(host_tensors(model), "weights")
        meter.hold(frozen_tensors(model), "weights")
        meter.hold([p for p in model.parameters() if p.requires_grad], "adapters")
        for pack in of.packs:
            tensors = (pack.ids, pack.positions, pack.score_at, pack.labels, *pack.shares.values())
            meter.hold([*tensors, *(role.offsets for role in pack.roles.values())], "pack")
        meter.hold([p.grad for p in model.parameters() if p.requires_grad], "gradients")
        meter.begin()
        with nullcontext() if act is None else torch.no_grad():
            act(of) if act else backward(model, of, ORPO, Path(chunk_tokens=64))
    # On a CPU a pack's tensors share a storage here and there, on meta each has its own.
    meter.trace = [(name, live - sum(meter.static.values())) for name, live in meter.trace]
    return meter


def beyond(meter: Meter) -> int:
    """Bytes on the device at the peak beyond what was there before the step."""
    return meter.top["device"] - sum(size for size in meter.static.values())
