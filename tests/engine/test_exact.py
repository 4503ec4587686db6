"""The promise of the waist: Logps equal plain transformers with whole logits, on every architecture."""

import pytest
import torch
from torch import Tensor

from lite.attention.branch_attention import install, plain_attention
from lite.data.packs import Layout
from lite.engine import score
from lite.engine.forward import Path
from lite.model.rotary import regimes
from tests.architectures import ARCHITECTURES

ROLES = ("chosen", "rejected")


def plain_logps(model, examples) -> Tensor:
    """Every completion alone through the model as transformers has it: chosen ones first."""
    found = []
    with plain_attention(model), torch.no_grad():
        for c in range(2):
            for example in examples:
                ids = torch.tensor([example.prompt + example.completions[c]], device=model.device)
                logits = model(input_ids=ids, use_cache=False).logits
                logps = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
                found.append(logps[0, :-1].gather(1, ids[0, 1:, None])[len(example.prompt) - 1 :, 0])
    return torch.cat(found)


def our_logps(model, examples, **layout) -> Tensor:
    layout = Layout(ROLES, rotary_bound=regimes(model.config).bound, **layout)
    install(model, padded=layout.padded)
    found = score.logps(model, examples, layout, Path(chunk_tokens=7))
    return torch.cat([found[role].tokens for role in ROLES])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "layout", [{}, {"tokens_per_pack": 64}, {"padded": True}, {"tokens_per_pack": 40, "split_pairs": True}]
)
def test_fp32_logps_equal_plain_transformers(tiny_model, token_examples, architecture: str, layout: dict):
    model, examples = tiny_model(architecture), token_examples()
    plain, ours = plain_logps(model, examples), our_logps(model, examples, **layout)
    assert float(((ours - plain) / plain).abs().max()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_errs_no_more_than_naive_bf16(tiny_model, token_examples, architecture: str):
    """RMS error against fp32 over 20 seeds: at most 1.1 times that of plain transformers in bf16."""
    naive, ours = [], []
    for seed in range(20):
        low = tiny_model(architecture, dtype=torch.bfloat16, seed=seed)
        examples = token_examples(seed)
        ours.append(our_logps(low, examples))
        naive.append(plain_logps(low, examples))
        exact = plain_logps(low.float(), examples)  # the same weights, computed in fp32
        naive[-1], ours[-1] = (naive[-1] - exact).square().mean(), (ours[-1] - exact).square().mean()
    assert torch.stack(ours).mean().sqrt() <= 1.1 * torch.stack(naive).mean().sqrt()


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_on_cuda_errs_no_more_than_naive_bf16(tiny_model, token_examples, architecture: str):
    """The same budget with variable-length flash attention and Liger's kernel."""
    naive, ours = [], []
    for seed in range(20):
        low = tiny_model(architecture, dtype=torch.bfloat16, seed=seed).cuda()
        examples = token_examples(seed)
        outcomes = our_logps(low, examples), plain_logps(low, examples)
        exact = plain_logps(low.float(), examples)
        for errors, outcome in zip((ours, naive), outcomes, strict=True):
            errors.append((outcome - exact).square().mean())
    assert torch.stack(ours).mean().sqrt() <= 1.1 * torch.stack(naive).mean().sqrt()
