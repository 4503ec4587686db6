"""What transformers' Trainer would do wrongly here, each a test; and the lines that it logs."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

from lite.data.batches import plan_batches
from lite.engine import score
from lite.errors import RunError
from lite.train import checkpoints, interrupt, metrics, samples, train
from lite.train.arguments import arguments
from lite.train.progress import Quiet
from lite.train.trainer import Trainer
from lite.train.work import read, set_up


@pytest.fixture
def trainer(recipe: Callable) -> Callable[..., Trainer]:
    """trainer(save_steps=…): one that is ready to train in the recipe's folder."""

    def build(**changes: object) -> Trainer:
        asked = recipe(**changes)
        work = set_up(asked, *read(asked, Quiet()), Quiet(), open_until=ExitStack())
        folder = Path(asked.output_dir)
        (folder / "checkpoints").mkdir(parents=True)
        made = Trainer(
            work.model,
            asked,
            work.batches,
            objective=work.objective,
            scalars=work.scalars,
            refresh=None,
            path=work.path,
            room=work.room,
            evaluate=work.evaluate,
            folder=folder,
            progress=Quiet(),
            request=interrupt.Request(),
        )
        made.work = work
        return made

    return build


def adapter(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_trap_resume_keeps_the_adapters_dtype(trainer: Callable) -> None:
    """peft's load_adapter, which Trainer calls, makes a bf16 adapter fp32."""
    made = trainer(num_train_epochs=0.6)
    made.train()
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    folder = checkpoints.write(made.folder / "checkpoints", 99, made._fill)
    saved = adapter(made)
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    made._load_from_checkpoint(str(folder))
    loaded = adapter(made)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name


def test_trap_evaluation_weighs_rows_not_batches(trainer: Callable) -> None:
    """Three held-out rows in batches of two: the mean over rows, not the mean of (mean of two, one)."""
    made = trainer(batch_size=2, num_train_epochs=0.1, learning_rate=0.05)
    made.train()
    work = made.work
    scored = score.logps(work.model.eval(), work.data.held_out, work.layout, work.path)
    loss, _, names = work.objective.summands[0]
    rows = loss(scored, {name: work.objective.hyperparameters[key] for name, key in names.items()}).loss.tolist()
    found = made.evaluate()["eval_loss"]
    assert math.isclose(found, sum(rows) / 3, rel_tol=1e-5)
    assert not math.isclose(found, ((rows[0] + rows[1]) / 2 + rows[2]) / 2, rel_tol=1e-5)


def test_trap_nan_stops_the_run_and_names_the_rows(trainer: Callable) -> None:
    """Trainer would log the mean of the losses before and go on."""
    made = trainer(save_steps=1)
    made.args.max_steps = 3
    made.train()
    before = checkpoints.listed(made.folder / "checkpoints")
    kept = adapter(made)
    name, broken = next((n, p) for n, p in made.model.named_parameters() if p.requires_grad)
    broken.data.view(-1)[0] = math.nan
    made.args.max_steps = 10
    with pytest.raises(RunError) as caught:
        made.train(resume_from_checkpoint=None)
    message = str(caught.value)
    assert "Step 1: the loss is nan." in message
    places = [str(place) for place in made.batches[0].places]
    assert len(places) == 4
    assert all(place in message for place in places)
    assert f"Last checkpoint: {before[-1]}" in message
    assert checkpoints.listed(made.folder / "checkpoints") == before
    assert all(checkpoints.problems(folder) == [] for folder in before)
    after = adapter(made)
    assert all(torch.equal(after[key], kept[key]) for key in kept if key != name)


def test_trap_infinite_gradient_under_a_finite_loss(trainer: Callable) -> None:
    made = trainer()
    kept = adapter(made)
    trained = next(p for p in made.model.parameters() if p.requires_grad)
    trained.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    with pytest.raises(RunError, match=r"Step 1: the gradient's norm is (inf|nan)"):
        made.train()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in adapter(made).items())
    assert metrics.read(made.folder / "metrics.jsonl") == []


def test_trap_two_gpus_do_not_mean_dataparallel(
    trainer: Callable, recipe: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = trainer()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert TrainingArguments(output_dir=str(tmp_path)).n_gpu == 2  # the trap
    made.args = arguments(recipe(), tmp_path, 10, device=torch.device("cuda"), evaluates=True)
    assert made.args.n_gpu == 1
    assert made._wrap_model(made.model) is made.model


def test_trap_checkpoints_are_staged(trainer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer writes into the final folder: a full disk leaves half a checkpoint under a whole one's name."""
    made = trainer()
    save, saved = torch.save, []

    def full_at_the_second_checkpoint(content: object, path: str, *others: object) -> None:
        saved.append(path)
        if len(saved) == 5:  # optimizer, scheduler, generators; optimizer, and half of the scheduler
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, path, *others)

    monkeypatch.setattr(torch, "save", full_at_the_second_checkpoint)
    with pytest.raises(RunError, match=r"checkpoint-6: the checkpoint could not be written.*No space left"):
        made.train()
    assert [path.name for path in (made.folder / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert checkpoints.newest(made.folder / "checkpoints", pytest.fail).name == "checkpoint-3"


def test_lines_have_trls_names_and_average_the_interval(trainer: Callable) -> None:
    """logging_steps=2: a line is the mean of two steps' losses, and epochs are passes over the rows."""
    each, pairs = trainer(), None
    each.train()
    single = [line for line in metrics.read(each.folder / "metrics.jsonl") if "loss" in line]
    (each.folder / "metrics.jsonl").unlink()
    (each.folder / "speed.jsonl").unlink()
    for folder in checkpoints.listed(each.folder / "checkpoints"):
        checkpoints._remove(folder)
    (each.folder / "checkpoints").rmdir()
    pairs = trainer(logging_steps=2)
    pairs.train()
    double = [line for line in metrics.read(pairs.folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in single] == list(range(1, 11))
    assert [line["epoch"] for line in single] == [step / 5 for step in range(1, 11)]
    assert [line["step"] for line in double] == [2, 4, 6, 8, 10]
    names = {"loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens", "nll_loss", "log_odds_ratio"}
    names |= {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
    assert names | {"logps/chosen", "logps/rejected", "log_odds_chosen"} == single[0].keys()
    for one, two, both in zip(single[::2], single[1::2], double, strict=True):
        assert both["loss"] == (one["loss"] + two["loss"]) / 2
        assert both["num_tokens"] == two["num_tokens"]
        assert both["learning_rate"] == two["learning_rate"]


def test_learning_rate_warms_up_and_comes_down(trainer: Callable) -> None:
    """Warm-up of ceil(0.25 · 10) = 3 steps, the first of them not 0, then half a cosine over 7."""
    made = trainer(warmup_ratio=0.25, learning_rate=1.0, max_grad_norm=0.0)
    made.train()
    lines = metrics.read(made.folder / "metrics.jsonl")
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    expected = [step / 3 for step in (1, 2, 3)] + [0.5 * (1 + math.cos(math.pi * step / 7)) for step in range(7)]
    assert rates == pytest.approx(expected)


class Scalars(TorchDispatchMode):
    """Counts the numbers that are asked of tensors one at a time, each of which a GPU would be waited for."""

    asked = 0

    def __torch_dispatch__(self, op: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = op(*args, **(kwargs or {}))
        # Not the zero of the host's that Trainer takes for the sum of its losses.
        self.asked += "_local_scalar_dense" in str(op) and result != 0.0
        return result


def test_a_step_is_waited_for_once(trainer: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For loss, metrics and norm together; to log them, and to lay out the next batch, takes no more."""
    listed, epochs, tolist = [], [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: listed.append(tensor.dtype) or tolist(tensor))
    monkeypatch.setattr(
        "lite.train.work.plan_batches", lambda *a, **k: epochs.append(k["epoch"]) or plan_batches(*a, **k)
    )
    found = []
    for steps in (2, 4, 7):
        made = trainer(max_steps=steps, save_steps=100, optimizer="adamw", output_dir=str(tmp_path / str(steps)))
        listed.clear()
        with Scalars() as scalars:
            made.train()
        assert len(metrics.read(made.folder / "metrics.jsonl")) == steps
        found.append((listed.count(torch.float64), scalars.asked))
    assert [count for count, _ in found] == [2, 4, 7]
    assert len({asked for _, asked in found}) == 1
    assert epochs == [0, 0, 0, 1]  # of seven steps, five are an epoch's


def test_no_room_on_the_gpu_says_what_to_lower(trainer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer()

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    monkeypatch.setattr(torch.autograd, "backward", full)
    with pytest.raises(RunError, match=r"Step 1: out of GPU memory, with \d+ tokens .* Tried to allocate") as caught:
        made.train()
    assert "--max-length" in str(caught.value)


def test_no_room_before_the_first_step_says_so_too(recipe: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    monkeypatch.setattr(samples, "answers", full)
    with pytest.raises(RunError, match=r"Out of GPU memory. CUDA out of .*GiB\.\nLower --tokens-per-pack"):
        train(recipe())


def test_each_evaluation_is_one_line(trainer: Callable) -> None:
    """Every three steps and at the end: Trainer asks for the last one again when its epoch ends."""
    made = trainer(eval_steps=3)
    made.train()
    lines = metrics.read(made.folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6, 9, 10]
