"""A run's memory: planned before anything is loaded, stopped if it does not fit, told beside what was measured."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lite.cli import main
from lite.engine.layout import TOKENS_PER_PACK
from lite.recipe import Recipe, load, planned_settings
from lite.train import resume, train
from lite.train.memory import EVERY_LAYER
from lite.train.progress import Quiet

OWN = '''
from lite.loss.registry import Scored, loss


@loss(learning_rate=1e-5)
def curious(chosen, rejected, *, beta: float = 0.1):
    """Looks at a number while it computes, which a tensor without numbers has not.

    loss = −β · gap

    Source: nobody.
    """
    gap = chosen.mean - rejected.mean
    if gap.sum().item() > 1e9:
        gap = gap * 0
    return Scored(-beta * gap, {})
'''


class Notes(Quiet):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def test_planned_and_measured_stand_side_by_side(recipe: Callable[..., Recipe]) -> None:
    """In the notes, in step 1's line of speed.jsonl and in plan.json; and the run's recipe has everything settled."""
    notes = Notes()
    run = train(recipe(max_steps=2, eval_data=None), notes)
    [plan] = [line for line in notes.said if line.startswith("plan: fits: ")]
    assert " layer" in plan
    [told] = [line for line in notes.said if line.startswith("memory: planned ")]
    assert ", measured " in told
    first, second = map(json.loads, (run.folder / "speed.jsonl").read_text().splitlines())
    assert first["planned_bytes"] > 0
    assert first["memory_bytes"] > 0
    assert "planned_bytes" not in second
    written = json.loads((run.folder / "plan.json").read_text())
    assert written["fits"] is True
    assert written["longest_row"].partition(":")[0].endswith("pairs.jsonl")
    settled = load(run.folder / "recipe.yaml")
    assert {name: getattr(settled, name) for name in planned_settings()} == written["settings"]
    again = train(settled.model_copy(update={"output_dir": str(run.folder.parent / "again")}))
    assert [m["loss"] for m in again.metrics if "loss" in m] == [m["loss"] for m in run.metrics if "loss" in m]


def test_what_does_not_fit_does_not_start(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says how much is needed, where the longest row is and what would help, and ends with 2."""
    typed = ["orpo", "--model", str(tiny / "model"), "--data", str(tiny / "pairs.jsonl"), "--device", "cpu", "--4bit"]
    typed += ["--dtype", "float32", "--chunk-tokens", "64", "--no-split-pairs", "--optimizer", "adamw-8bit"]
    assert main([*typed, "--lora-r", "4", "--vram", "0.2MB", "--output-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "error: It does not fit: " in said
    assert "The longest example is " in said
    assert "pairs.jsonl:" in said
    assert "--force trains all the same" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_force_goes_on_and_so_does_resume(recipe: Callable[..., Recipe]) -> None:
    notes = Notes()
    small = recipe(vram="0.2MB", max_steps=1, recompute_layers=2, split_pairs=False, chunk_tokens=64, force=True)
    run = train(small, notes)
    assert "it goes on all the same" in notes.said
    assert resume(run.folder, max_steps=2).result["steps"] == 2


def test_a_run_without_a_plan_goes_on_and_says_so(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """A loss that asks for a number cannot be run without numbers: what is left open is what is safest."""
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    notes = Notes()
    run = train(recipe(method=f"{tmp_path}/own.py:curious", max_steps=1, chunk_tokens=64), notes)
    assert any(line.startswith("no plan: ") and "cannot be run without its numbers" in line for line in notes.said)
    settled = load(run.folder / "recipe.yaml")
    assert (settled.recompute_layers, settled.tokens_per_pack) == (EVERY_LAYER, TOKENS_PER_PACK)
    assert settled.chunk_tokens == 64
    assert not (run.folder / "plan.json").exists()
    assert "planned_bytes" not in json.loads((run.folder / "speed.jsonl").read_text().splitlines()[0])
