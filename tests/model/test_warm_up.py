"""Every kernel that a step starts was started before, of the same widths and dtypes: on meta, as if on CUDA."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lite.attention.branch_attention import install
from lite.device import meta_stands_for
from lite.engine.layout import layout_of, path_of
from lite.memory.levers import Levers, pull
from lite.model import adapters
from lite.model.norms import replace_norms
from lite.model.warm_up import warm_up
from lite.plan import dry_run
from lite.plan.cards import CARDS
from lite.plan.lengths import batch_of
from lite.recipe import Recipe
from tests.model.quantised import dtype_of, store_linears
from tests.model.tiny import tiny_model
from tests.plan.conftest import ROWS

META = torch.device("meta")
OPERATORS = {"rms_norm", "rms_norm_again", "rms_norm_backward", "gated", "gated_backward_", "rotate", "four_bits"}
LEFT_ALONE = {"gemma2": {"rms_norm", "rms_norm_again", "rms_norm_backward"}, "phi3": {"rotate"}}  # of other code


class Started(TorchDispatchMode):
    """What Triton compiles lite's operators for."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op.name().startswith("lite::"):
            # Of NF4 it is in the block size, and whether there is an offset; not in the matrix.
            known = sized if "four_bits" not in op.name() else lambda x: x.dtype
            of = [known(arg) if isinstance(arg, Tensor) else arg for arg in args if not isinstance(arg, float | list)]
            self.kernels.add((op.name(), *of))
        return op(*args, **(kwargs or {}))


def sized(x: Tensor) -> tuple[Any, ...]:
    """Width, heads, whether there is one table for all, and what of strides 16 divides."""
    ones = (x.shape[1],) if x.ndim == 4 else (len(x) == 1,) if x.ndim == 3 else ()
    return (x.dtype, x.shape[-1], *ones, *[stride if stride == 1 else stride % 16 == 0 for stride in x.stride()])


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("qwen3", "nf4"), ("gemma2", "bf16"), ("phi3", "nf4")],
)
def test_a_step_starts_no_kernel_for_the_first_time(architecture: str, kind: str):
    with META:
        model = store_linears(tiny_model(architecture, head_dim=32), kind)
    replace_norms(model)
    with meta_stands_for("cuda"), Started() as before:
        warm_up(model, META, dtype_of(kind))
    recipe = Recipe(model="none", lora_r=4, dtype="bfloat16", chunk_tokens=16)
    with META:
        model = adapters.attach(model, recipe).train()
    install(model)
    pull(model, Levers(recompute_layers=1))
    with meta_stands_for("cuda"), Started() as step:
        batch = batch_of(ROWS, layout_of(recipe, model), ROWS.batch_tokens)
        dry_run.dry_run(model, batch, recipe, path_of(recipe), card=CARDS["h100"], device_type="cuda")
    names = {name.removeprefix("lite::") for name, *_ in step.kernels}
    assert names == OPERATORS - LEFT_ALONE.get(architecture, set()) - ({"four_bits"} if kind == "bf16" else set())
    assert step.kernels <= before.kernels


def test_on_a_cpu_nothing_is_started():
    model = tiny_model("qwen3")
    replace_norms(model)
    with Started() as started:
        warm_up(model, torch.device("cpu"), torch.float32)
    assert not started.kernels
