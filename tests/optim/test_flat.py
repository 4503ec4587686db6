"""AdamW in eight bits, many parameters at once: bitsandbytes' own beside it, bit for bit."""

import io

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lite.optim import flat
from lite.optim.flat import FlatAdamW8bit
from tests.optim.fed import normal

# Whole blocks and not; the least that is kept in eight bits, and less; larger than a chunk of 9,000; a number.
SHAPES = [(64, 64), (4097,), (70, 61), (63, 65), (3, 5), (100, 100), (17, 300), (96, 64), (5001,), ()]
STEPS, WITHOUT = 6, {2: (1, 7), 3: (1,), 5: range(len(SHAPES))}  # which have no gradient in a step
KINDS = pytest.mark.parametrize("kind", [bitsandbytes.optim.AdamW8bit, FlatAdamW8bit])


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    return [nn.Parameter(normal(*shape, seed=i, dtype=dtype).to(device)) for i, shape in enumerate(SHAPES)]


def made(kind: type, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [{"params": params[:5], "weight_decay": 0.3}, {"params": params[5:], "weight_decay": 0.0, "lr": 0.02}]
    return kind(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6)


def train(update: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for i, parameter in enumerate(params):
            gradient = normal(*parameter.shape, seed=100 * step + i, dtype=parameter.dtype) * 10.0 ** (i % 4)
            gradient = gradient.to(parameter.device)
            parameter.grad = gradient.t().contiguous().t() if i == 5 else gradient
            if step in WITHOUT and i in WITHOUT[step]:
                parameter.grad = None
        update.param_groups[0]["lr"] = 0.01 / (step + 1)
        update.step()
        update.zero_grad()


def assert_same(found: object, expected: object) -> None:
    """Dictionaries and lists of tensors and numbers, bit for bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("chunk", [1, 9_000, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_bitsandbytes_however_many_are_updated_at_once(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and states after six steps, with gradients that are missing, late, transposed or of another size."""
    monkeypatch.setattr(flat, "CHUNK", chunk)
    ours, theirs = parameters(dtype), parameters(dtype)
    update, plain = made(FlatAdamW8bit, ours), made(bitsandbytes.optim.AdamW8bit, theirs)
    train(update, ours, range(STEPS))
    train(plain, theirs, range(STEPS))
    assert_same([p.detach() for p in ours], [p.detach() for p in theirs])
    assert_same(update.state_dict(), plain.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_it_is_on_a_gpu(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype, "cuda"), parameters(dtype, "cuda")
    update, plain = made(FlatAdamW8bit, ours), made(bitsandbytes.optim.AdamW8bit, theirs)
    train(update, ours, range(STEPS))
    train(plain, theirs, range(STEPS))
    assert_same([p.detach() for p in ours], [p.detach() for p in theirs])
    assert_same(update.state_dict(), plain.state_dict())


def test_what_fills_up_a_block_is_not_felt() -> None:
    """β₁ = 1/2: gradients of 1 and −1/2 leave a first moment of zero, alone in its block but for what fills it up.

    Beside it zeros would be stored as a millionth of what the moment was, and be the block's largest from then on.
    """
    params = [nn.Parameter(torch.zeros(4097)), nn.Parameter(torch.zeros(4096))]
    update = FlatAdamW8bit(params, betas=(0.5, 0.9))
    for gradient in (1.0, -0.5):
        for parameter in params:
            parameter.grad = torch.full_like(parameter, gradient)
        update.step()
    assert update.state[params[0]]["absmax1"].tolist() == [0.0] * 17
    assert create_dynamic_map()[flat.ZERO] == 0


@pytest.mark.parametrize("second", [bitsandbytes.optim.AdamW8bit, FlatAdamW8bit])
@KINDS
def test_a_checkpoint_of_either_is_gone_on_with_by_either(kind: type, second: type) -> None:
    """Through a file; and it is as large as bitsandbytes' own, though the states are parts of larger tensors."""
    undisturbed, params = parameters(), parameters()
    train(made(bitsandbytes.optim.AdamW8bit, undisturbed), undisturbed, range(STEPS))
    train(update := made(kind, params), params, range(3))
    file, size = io.BytesIO(), sum(2 * p.numel() for p in params)
    torch.save(update.state_dict(), file)
    assert size < file.tell() < 2 * size
    file.seek(0)
    update = made(second, params)
    update.load_state_dict(torch.load(file, weights_only=True))
    train(update, params, range(3, STEPS))
    assert_same([p.detach() for p in params], [p.detach() for p in undisturbed])


def test_saving_changes_nothing_and_a_state_that_was_saved_does_not_change() -> None:
    params = parameters()
    train(update := made(FlatAdamW8bit, params), params, range(2))
    saved = update.state_dict()
    before = [state["__bnb_optimizer_quant_state__"]["state1"].clone() for state in saved["state"].values()]
    train(update, params, range(2, 4))
    after = [state["__bnb_optimizer_quant_state__"]["state1"] for state in saved["state"].values()]
    assert_same(after, before)
    assert not torch.equal(update.state[params[0]]["state1"], after[0])


def test_weights_that_were_put_elsewhere_are_trained_there() -> None:
    params, plain = parameters(), parameters()
    update, expected = made(FlatAdamW8bit, params), made(bitsandbytes.optim.AdamW8bit, plain)
    train(update, params, range(1))
    for parameter in params:
        parameter.data = parameter.data.clone()
    train(update, params, range(1, 3))
    train(expected, plain, range(3))
    assert_same([p.detach() for p in params], [p.detach() for p in plain])


def test_a_step_is_one_launch_however_many_parameters_there_are() -> None:
    class Started(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.names.append(op.name())
            return op(*args, **(kwargs or {}))

    params = [nn.Parameter(torch.zeros(16, 256, device="meta")) for _ in range(50)]
    update = FlatAdamW8bit(params)
    for _ in range(2):
        for parameter in params:
            parameter.grad = torch.zeros_like(parameter)
        with Started() as started:
            started.names.clear()
            update.step()
    nothing = ("aten::slice", "aten::view", "aten::detach", "aten::empty", "aten::new_empty", "profiler::")
    found = [name for name in started.names if not name.startswith(nothing)]
    copy, update_all = "aten::_foreach_copy_", "bitsandbytes::optimizer_update_8bit_blockwise"
    assert found == [copy, copy, update_all, copy]
