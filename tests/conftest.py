"""Tiny models built from configs, and examples of random tokens."""

import functools
import os
import signal
import tempfile
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from lite.data.examples import Place, TokenExample
from tests.architectures import VOCABULARY, tiny_config


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """tiny_model("qwen3", dtype=torch.float64, seed=1, **config changes), its weights large enough to matter."""

    def build(
        architecture: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
    ) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        if dtype == torch.float64:
            _norms_in_fp64(model)
        return model.to(dtype).eval()

    return build


def _norms_in_fp64(model: PreTrainedModel) -> None:
    """transformers' RMSNorm goes down to fp32 whatever the model's dtype, which would hide errors below 1e-7."""

    def forward(norm: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        weight = 1 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight
        return weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(forward, module)


@pytest.fixture
def token_examples() -> Callable[..., list[TokenExample]]:
    """token_examples(seed): pairs of unlike lengths, one of them of single tokens, one straddling LongRoPE's bound."""

    def build(
        seed: int = 1, shapes: tuple = ((20, 30, 12), (5, 1, 9), (40, 20, 60), (3, 4, 4), (1, 2, 1))
    ) -> list[TokenExample]:
        generator = torch.Generator().manual_seed(seed)

        def ids(count: int) -> tuple[int, ...]:
            return tuple(torch.randint(3, VOCABULARY, (count,), generator=generator).tolist())

        return [
            TokenExample(ids(prompt), tuple(ids(length) for length in completions), Place("pairs.jsonl", row))
            for row, (prompt, *completions) in enumerate(shapes, 1)
        ]

    return build


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_configure(config: pytest.Config) -> None:
    # No test may write into the user's cache, nor find rows there.
    cache = tempfile.TemporaryDirectory(prefix="lite-cache-", ignore_cleanup_errors=True)
    os.environ["LITE_CACHE"] = cache.name
    config.add_cleanup(cache.cleanup)
    # A shell starts what runs in its background deaf to Ctrl-C, and children inherit that: tests of signals need ears.
    signal.signal(signal.SIGINT, signal.default_int_handler)
