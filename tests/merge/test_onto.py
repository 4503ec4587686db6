"""Onto which base: what is measured, what is kept, and what is said where nothing can be measured."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lite.data.prepare import prepare
from lite.errors import ExportError
from lite.loss.logps import Logps
from lite.merge import onto
from lite.merge.companions import load_tokenizer
from lite.merge.onto import TRAINED, Measured
from lite.merge.source import ORIGINAL, QUANTISED
from lite.train.run import opened
from tests.merge.test_source import change


class Notes:
    """A Progress that remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def stage(self, message: str) -> None:
        self.said.append(message)

    note = stage

    def rows(self, done: int, total: int, unit: str = "rows") -> None:
        pass


def test_pairs_by_hand() -> None:
    """Chosen −1 a token (2 tokens) and −3 (1 token): mean −2. Margins −2 − (−4) = 2 and −3 − (−4) = 1: mean 1.5."""
    said = {
        "chosen": Logps(torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([0, 2, 3])),
        "rejected": Logps(torch.tensor([-4.0, -2.0, -2.0]), torch.tensor([0, 1, 3])),
    }
    assert onto.measured(ORIGINAL, said, [None, None]) == Measured(ORIGINAL, -2.0, 1.5)


def test_single_completions_by_hand() -> None:
    """Desirable: −1 a token, −2 in all; the other −5 in all: margin 3. Without labels every one is chosen."""
    said = {"completion": Logps(torch.tensor([-1.0, -1.0, -5.0]), torch.tensor([0, 2, 3]))}
    assert onto.measured(QUANTISED, said, [True, False]) == Measured(QUANTISED, -1.0, 3.0)
    assert onto.measured(QUANTISED, said, [None, None]) == Measured(QUANTISED, -3.0, None)


def test_the_better_is_the_one_that_says_more_of_chosen() -> None:
    """Whatever the margin is; the original where both say the same."""

    def kept(original: float, quantised: float) -> str:
        return onto.better(
            [Measured(TRAINED, 0, 0), Measured(ORIGINAL, original, 9), Measured(QUANTISED, quantised, 1)]
        )

    assert kept(-2.0, -1.9) == QUANTISED
    assert kept(-1.9, -2.0) == kept(-2.0, -2.0) == ORIGINAL
    *_, last = onto.table([Measured(ORIGINAL, -2.0, None), Measured(QUANTISED, -1.5, None)])
    assert last == "merged onto the quantised weights, under which log p of chosen is higher"


def test_both_are_measured_beside_the_training(trained: Callable[..., Path]) -> None:
    """On the very weights that training saw the merged model says what training said."""
    run, progress = trained(load_in_4bit=True), Notes()
    source = onto.settled(run, progress=progress)
    live, original, quantised = (Measured(**one) for one in source.compared)
    assert (live.weights, original.weights, quantised.weights) == (TRAINED, ORIGINAL, QUANTISED)
    assert quantised.chosen_logp == pytest.approx(live.chosen_logp, abs=1e-6)
    assert quantised.margin == pytest.approx(live.margin, rel=1e-6)
    assert original.chosen_logp != quantised.chosen_logp
    assert source.onto == (QUANTISED if quantised.chosen_logp > original.chosen_logp else ORIGINAL)
    (line,) = [line for line in progress.said if line.startswith("quantised")]
    assert f"{quantised.chosen_logp:.4f}" in line
    assert not list(run.glob(".onto*"))
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert live.chosen_logp == pytest.approx(result["eval_after"]["eval_logps/chosen"], rel=1e-5)


def test_a_choice_is_honoured_and_where_there_is_none_nothing_is_measured(trained: Callable[..., Path]) -> None:
    for asked in (ORIGINAL, QUANTISED):
        source = onto.settled(trained(load_in_4bit=True), onto=asked)
        assert (source.onto, source.compared) == (asked, ())
    source = onto.settled(trained())
    assert (source.onto, source.compared) == (None, ())
    with pytest.raises(ExportError, match="--onto both: expected one of original, quantised, auto"):
        onto.settled(trained(), onto="both")


@pytest.mark.parametrize("gone", ["file", "rows", "stdin"])
def test_rows_that_are_not_the_runs(trained: Callable[..., Path], tiny: Path, tmp_path: Path, gone: str) -> None:
    """A file that is gone, one that has changed, rows that nobody has kept: said, and it is the original."""
    run = shutil.copytree(trained(load_in_4bit=True), tmp_path / "run")
    if gone == "rows":
        change(run / "identity.json", data="another")
    else:
        text = (run / "recipe.yaml").read_text(encoding="utf-8")
        other = "'-'" if gone == "stdin" else str(tmp_path / "gone.jsonl")
        (run / "recipe.yaml").write_text(text.replace(str(tiny / "held_out.jsonl"), other), encoding="utf-8")
    progress = Notes()
    source = onto.settled(run, progress=progress)
    assert (source.onto, source.compared) == (ORIGINAL, ())
    told = next(line for line in progress.said if line.startswith("not measured"))
    assert {"file": "cannot be read", "rows": "are not those of the run", "stdin": "came from stdin"}[gone] in told
    assert any("--onto quantised" in line for line in progress.said)


def test_single_completions_with_labels(trained: Callable[..., Path], tmp_path: Path) -> None:
    """KTO's rows have another row's completion beside their own, which is none of theirs. In 8 bits, for a change."""
    run = trained(method="kto", load_in_8bit=True, cache=str(tmp_path / "cache"))
    live, original, quantised = (Measured(**one) for one in onto.settled(run).compared)
    assert original.chosen_logp != quantised.chosen_logp
    assert quantised.chosen_logp == pytest.approx(live.chosen_logp, abs=1e-6)
    assert live.margin is not None
    assert quantised.margin == pytest.approx(live.margin, rel=1e-5)


def test_layers_that_visit_from_the_host_say_the_same(trained: Callable[..., Path], tiny: Path) -> None:
    recipe = opened(trained(load_in_4bit=True)).model_copy(update={"load_in_4bit": False})
    data = prepare(recipe, load_tokenizer(tiny / "model"))
    here, there = (onto._said(recipe, data.held_out, layers, Notes()) for layers in (0, 2))
    for name in ("chosen", "rejected"):
        assert torch.equal(here[name].tokens, there[name].tokens)


def test_layers_without_room_by_hand() -> None:
    """Tensors of 1 GiB: 4 layers, 1 of the tower's, the embedding, and 3 GiB for scoring are 9. One too few takes a
    layer and the room of two: 3; with nothing free all of them are elsewhere.
    """
    shape, itemsize = (2**29,), 2
    layers = [f"language_model.model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    others = ["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "language_model.model.embed_tokens.weight"]
    shapes = dict.fromkeys([*layers, *others], shape)
    found = [onto.host_layers(shapes, itemsize, free * 2**30) for free in (9, 8, 0)]
    assert found == [0, 3, 4]
