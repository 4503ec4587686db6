"""A model in NF4 or int8 computes on CUDA what its bytes stand for, no less precisely than plain bf16 layers would.

The truth is the same model in fp32 on the CPU, its matrices dequantised from the same bytes. On the CPU the test tries
itself.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lite.attention.branch_attention import install
from lite.data.packing import lay_out
from lite.data.packs import Layout
from lite.engine.forward import Path, placed, scored_tokens
from lite.model import adapters, frozen
from lite.model.norms import replace_norms
from lite.model.weights import move_but_first
from lite.recipe import Recipe
from tests.model.quantised import store_linears
from tests.model.tiny import tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SEEDS = range(4)


def adapted(kind: str, device: str, dtype: torch.dtype, *, plain: bool, seed: int) -> PeftModel:
    """The model of these bytes: as lite has it, or transformers' and peft's own with dequantised matrices (`plain`)."""
    model = store_linears(tiny_model("qwen3"), kind)
    if plain:
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
            dense.weight = nn.Parameter(frozen.weight_of(layer, dtype), requires_grad=False)
            model.set_submodule(name, dense)
        model.to(dtype)
    move_but_first(model, torch.device(device), 0)
    if not plain:
        replace_norms(model)
        model = adapters.attach(model, Recipe(lora_r=4, lora_alpha=8.0))
        install(model)
    else:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (0.05 * torch.randn(parameter.shape, generator=draw)).to(device)
    return model.train()


def outcome(model: PeftModel, logps: Tensor) -> list[Tensor]:
    """Log-probs, and the gradient of a weighted sum of them, of all adapters as one vector."""
    weights = torch.linspace(-1, 1, len(logps), device=logps.device)
    (logps * weights).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return [logps.detach().double().cpu(), gradient.double().cpu()]


def packed(model: PeftModel, example) -> list[Tensor]:
    """By lite: one pack, its prompt shared."""
    (pack,) = placed(lay_out([example], Layout(("chosen", "rejected"))).packs, model)
    return outcome(model, scored_tokens(model, pack, Path(chunk_tokens=64)).logps)


def by_sequence(model: PeftModel, example) -> list[Tensor]:
    """By transformers: each completion with its prompt, whole logits."""
    found = []
    for completion in example.completions:
        ids = torch.tensor([example.prompt + completion], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(example.prompt) - 1 : -1]
        found.append(torch.log_softmax(logits.float(), -1).gather(1, ids[0, len(example.prompt) :, None])[:, 0])
    return outcome(model, torch.cat(found))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_it_errs_no_more_than_plain_bf16(token_examples, device: str, kind: str):
    """RMS error of log-probs and of gradients against fp32, over some adapters: at most 1.25 times the plain model's,
    on the same device; the truth is far from both zero and them."""
    ours, naive, truths = [], [], []
    for seed in SEEDS:
        (example,) = token_examples(seed, ((20, 30, 12),))
        truth = by_sequence(adapted(kind, "cpu", torch.float32, plain=True, seed=seed), example)
        lite = packed(adapted(kind, device, torch.bfloat16, plain=False, seed=seed), example)
        plain = by_sequence(adapted(kind, device, torch.bfloat16, plain=True, seed=seed), example)
        for errors, found in ((ours, lite), (naive, plain)):
            errors.append([float((a - b).square().mean()) for a, b in zip(found, truth, strict=True)])
        truths.append([float(one.square().mean()) for one in truth])
    for a, b, size in zip(*(torch.tensor(of).mean(0).sqrt() for of in (ours, naive, truths)), strict=True):
        assert 0 < a <= 1.25 * b < 0.25 * size
