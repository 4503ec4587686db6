"""Rotary schemes that change with length: where, by config; and that a score does not depend on what came before it."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lite.attention.branch_attention import install
from lite.data.examples import TokenExample
from lite.data.packs import Layout
from lite.engine import score
from lite.engine.forward import Path
from lite.model.rotary import Regimes, regimes
from tests.architectures import tiny_config

BOUND = 16
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LENGTHS = ((5, 30, 15), (5, 6, 12), (5, 20, 11))  # prompt and completions: beyond the bound, at it, and below


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("llama", {}, Regimes(None, False)),
        ("phi3-longrope", {}, Regimes(64, False)),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": BOUND}, Regimes(BOUND, True)),
    ],
)
def test_regimes_by_config(architecture: str, changes: dict, expected: Regimes):
    assert regimes(tiny_config(architecture, **changes)) == expected


@pytest.mark.parametrize("layout", [{}, {"padded": True}], ids=str)
def test_factors_that_grow_depend_on_one_completion_alone(tiny_model, token_examples, layout: dict):
    """transformers keeps the factors of the longest text so far: each plain score is that of a fresh model."""
    model = tiny_model("llama", rope_parameters=DYNAMIC, max_position_embeddings=BOUND)
    examples = token_examples(shapes=LENGTHS)
    plain = [_plain(copy.deepcopy(model), e, c) for c in range(2) for e in examples]
    install(model, padded=bool(layout))
    found = score.logps(
        model, examples, Layout(("chosen", "rejected"), rotary_bound=BOUND, rotary_grows=True, **layout), Path()
    )
    ours = torch.cat([found["chosen"].tokens, found["rejected"].tokens])
    assert torch.allclose(ours, torch.cat(plain), rtol=1e-5, atol=1e-5)


def _plain(model: PreTrainedModel, example: TokenExample, completion: int) -> Tensor:
    ids = torch.tensor([example.prompt + example.completions[completion]])
    with torch.no_grad():
        logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits, -1)
    return logps[0, :-1].gather(1, ids[0, 1:, None])[len(example.prompt) - 1 :, 0]
