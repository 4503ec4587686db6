"""A step or an evaluation that does not fit is done again in smaller packs, with the same result."""

import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lite.data.examples import Place, TokenExample
from lite.data.packing import lay_out, pack_sizes
from lite.data.packs import Layout
from lite.errors import RunError
from lite.model.layers import decoder_layers
from lite.recipe import Recipe, problems
from lite.train import checkpoints, failures, resume, train
from lite.train.progress import Quiet
from lite.train.recovery import Room, lowered
from lite.train.trainer import state

ROOM = 60  # tokens: less than the longest pair of the tiny world has, more than its longest completion
LAYOUT = Layout(("chosen", "rejected"), tokens_per_pack=1000)


class Notes(Quiet):
    """Remembers what was said of memory."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        if "out of memory" in message or "memory had run out" in message:
            self.said.append(message)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """card(300): from here on a layer with more tokens runs out of memory.

    `fails(tokens, training, backward)` may say when: layer 0 is run again in backward.
    """
    story = sys.modules["lite.train.train"]
    set_up = story.set_up

    def build(most: int | None = None, *, fails: Callable[[int, bool, bool], bool] | None = None) -> None:
        def check(mlp: torch.nn.Module, given: tuple) -> None:
            tokens = given[0].shape[:-1].numel()
            if fails(tokens, mlp.training, torch._C._current_graph_task_id() != -1) if fails else tokens > most:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to compute {tokens} tokens.\nMore of it")

        def with_check(*given: object, **named: object) -> object:
            work = set_up(*given, **named)
            next(iter(decoder_layers(work.model).values())).mlp.register_forward_pre_hook(check)
            return work

        monkeypatch.setattr(story, "set_up", with_check)

    return build


def pairs(*shapes: tuple[int, ...]) -> list[TokenExample]:
    return [
        TokenExample((5,) * prompt, tuple((6,) * length for length in completions), Place("pairs.jsonl", row))
        for row, (prompt, *completions) in enumerate(shapes, 1)
    ]


def same_metrics(one: list[dict], other: list[dict]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys()
        and all(math.isclose(a[key], b[key], rel_tol=2e-3, abs_tol=2e-4) for key in a if key != "num_tokens")
        for a, b in zip(one, other, strict=True)
    )


def test_budgets_go_down_to_one_completion() -> None:
    """Pairs of 100 and 60 tokens: 160 → 100, no half of which is a pair; then completions, of 70 at most; then none."""
    examples, layout, seen = pairs((40, 30, 30), (20, 20, 20)), LAYOUT, []
    while layout:
        sizes = pack_sizes(examples, layout)
        assert sizes == [pack.tokens for pack in lay_out(examples, layout).packs]
        seen.append((layout.tokens_per_pack, layout.split_pairs, max(sizes)))
        layout = lowered(layout, examples, max(sizes))
    assert seen == [(1000, False, 160), (100, False, 100), (70, True, 70)]


def test_budgets_go_down_by_halves() -> None:
    examples = pairs(*[(10, 5, 5)] * 16)
    assert lowered(LAYOUT, examples, 320) == Layout(LAYOUT.completions, tokens_per_pack=160)


def test_a_budget_below_every_example_is_not_raised() -> None:
    layout = Layout(LAYOUT.completions, tokens_per_pack=8)
    assert lowered(layout, pairs((10, 5, 5)), 20) == Layout(LAYOUT.completions, tokens_per_pack=8, split_pairs=True)


def test_padding_counts() -> None:
    """A padded pair of 10 + 30 and 10 + 2 tokens takes 80, and its completions 40 and 12."""
    layout = Layout(LAYOUT.completions, tokens_per_pack=1000, padded=True)
    smaller = lowered(layout, pairs((10, 30, 2)), 80)
    assert pack_sizes(pairs((10, 30, 2)), smaller) == [40, 12]
    assert lowered(smaller, pairs((10, 30, 2)), 40) is None


def test_what_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert failures.out_of_memory(caught.value)
    assert failures.out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert failures.out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))  # a kernel's first launch
    assert not failures.out_of_memory(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    assert not failures.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not failures.out_of_memory(ValueError("DefaultCPUAllocator"))


def test_another_attempt_draws_the_same_numbers() -> None:
    room, drawn, undone = Room(LAYOUT, lambda _: None, "Lower it."), [], []

    def attempt() -> str:
        drawn.append(torch.rand(3))
        if len(drawn) == 1:
            raise torch.OutOfMemoryError
        return "done"

    assert room.within("step 1", attempt, lambda: (pairs((10, 5, 5)), 20), lambda: undone.append(1)) == "done"
    assert torch.equal(*drawn)
    assert undone == [1]
    assert room.state() == {"tokens_per_pack": 15, "split_pairs": True, "times_lowered": 1}


def test_other_errors_pass() -> None:
    room = Room(LAYOUT, pytest.fail, "Lower it.")

    def wrong() -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        room.within("step 1", wrong, lambda: pytest.fail("asked"))


def test_a_run_that_does_not_fit_ends_as_one_that_does(recipe: Callable, card: Callable, tmp_path: Path) -> None:
    """On a card with room for less than a pair, whose completions must be computed alone: the same numbers, said once
    for each lowering; a resume goes on with the lowered budget, bit for bit.
    """
    plain = train(recipe(output_dir=str(tmp_path / "plain"), num_train_epochs=1))
    card(ROOM)
    notes = Notes()
    run = train(recipe(save_total_limit=10, num_train_epochs=1), notes)
    assert same_metrics(run.metrics, plain.metrics)
    found = run.result["packing"]
    assert found["split_pairs"]
    assert found["tokens_per_pack"] <= ROOM
    assert found["times_lowered"] == len(notes.said) >= 2
    assert notes.said[0].startswith("evaluation at step 0: out of memory with ")
    assert plain.result["packing"] | {"times_lowered": 0} == plain.result["packing"]

    again = shutil.copytree(run.folder, tmp_path / "again")
    (again / "result.json").unlink()
    checkpoints.keep_until(again / "checkpoints", 3)
    assert state(again / "checkpoints" / "checkpoint-3")["packing"] == found
    notes = Notes()
    resumed = resume(again, progress=notes)
    assert [note.partition(",")[0] for note in notes.said] == [
        f"going on with {found['tokens_per_pack']} tokens a pack"
    ]
    assert resumed.result["packing"] == found
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert (again / name).read_bytes() == (run.folder / name).read_bytes(), name


@pytest.mark.parametrize("backward", [False, True])
def test_half_a_step_leaves_nothing(recipe: Callable, card: Callable, tmp_path: Path, backward: bool) -> None:
    """Memory runs out in the second pack of step 2, whose first has left its gradient; other steps are as they were."""
    settings = {
        "tokens_per_pack": 200,
        "max_steps": 2,
        "samples": 0,
        "recompute_layers": 1,
        "offload_checkpoints": True,
    }
    plain = train(recipe(output_dir=str(tmp_path / "plain"), **settings))
    seen = []

    def fourth_pack(_: int, training: bool, in_backward: bool) -> bool:
        seen.append(training and in_backward == backward)
        return seen[-1] and seen.count(True) == 4

    card(fails=fourth_pack)
    notes = Notes()
    run = train(recipe(**settings), notes)
    assert len(notes.said) == 1
    assert notes.said[0].startswith("step 2: out of memory with ")
    assert same_metrics(run.metrics, plain.metrics)


def test_a_completion_that_does_not_fit_ends_the_run(recipe: Callable, card: Callable) -> None:
    card(fails=lambda _, training, __: training)
    with pytest.raises(RunError) as caught:
        train(recipe())
    text = str(caught.value)
    assert text.startswith("Step 1: out of GPU memory, with ")
    assert "which cannot be split. CUDA out of memory. Tried to compute" in text
    assert text.endswith("Lower --chunk-tokens or --max-length, or quantise the base (--4bit).")
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({}, {"--4bit"}),
        ({"galore": True}, {"--galore-rank", "--int8-weights"}),
        ({"galore": True, "int8_weights": True}, {"--galore-rank"}),
        ({"full": True, "dtype": "float32"}, {"--galore"}),
    ],
)
def test_what_to_lower_is_what_the_recipe_can(settings: dict[str, object], flags: set[str]) -> None:
    """Of whole weights no quantised base, which is refused beside them."""
    recipe = Recipe(**settings)
    one = {"--chunk-tokens", "--max-length"}
    assert set(re.findall(r"--[\w-]+", failures.lower_of_one(recipe))) == one | flags
    assert set(re.findall(r"--[\w-]+", failures.lower(recipe))) == one | flags | {"--tokens-per-pack", "--split-pairs"}
    assert bool(problems({**settings, "load_in_4bit": True})) == ("--4bit" not in flags)
