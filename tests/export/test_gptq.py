"""GPTQ and AWQ: what can be shown without GPTQModel, and, where it is installed, the whole of it."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lite.bundled
from lite.errors import ExportError
from lite.export import gptq, quantised_apart
from lite.export.order import Order
from lite.merge.onto import Measured
from lite.merge.source import source_of
from lite.train.progress import Quiet

BUNDLED = Path(lite.bundled.__file__).parent
INSTALLED = importlib.util.find_spec("gptqmodel") is not None


def rows(path: Path, count: int) -> str:
    """The first rows of the bundled data, as a file."""
    lines = (BUNDLED / "train.jsonl").read_text().splitlines()[:count]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.skipif(INSTALLED, reason="GPTQModel is installed")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_without_the_library_the_pip_line_is_given(method: str) -> None:
    """Before anything is written."""
    source = source_of(str(BUNDLED / "model"))
    with pytest.raises(ExportError, match=rf"--to {method}: .*pip install .gptqmodel"):
        gptq.require(source, Order("x", method))


def test_the_rows(tmp_path: Path) -> None:
    """Of a file a tenth is scored and the rest calibrated on; of few one."""
    source = source_of(str(BUNDLED / "model"))
    shown, scored = gptq._rows(source, Order("x", "gptq", data=rows(tmp_path / "rows.jsonl", 40)))
    assert (len(shown), len(scored)) == (36, 4)
    shown, scored = gptq._rows(source, Order("x", "gptq", data=rows(tmp_path / "few.jsonl", 4)))
    assert (len(shown), len(scored)) == (3, 1)


def test_figures_by_hand() -> None:
    """Over a vocabulary of two, logits (0, ln 3) for token 0 give it 1/4, for token 1 3/4, whatever stands before.

    Chosen (1, 1): a mean of ln 3/4 a token, and a total of 2 ln 3/4; rejected (0): ln 1/4.
    """

    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor([0.0, math.log(3)]))

        def forward(self, input_ids: torch.Tensor, logits_to_keep: int) -> Any:
            kept = self.logits.expand(1, input_ids.shape[1], 2)[:, -logits_to_keep:]
            return type("Output", (), {"logits": kept})

    rows = [[[0, 1], [[1, 1], [0]], None]]
    found = gptq._measured("merged", quantised_apart.said(Constant(), rows), rows)
    assert found.chosen_logp == pytest.approx(math.log(3 / 4))
    assert found.margin == pytest.approx(2 * math.log(3 / 4) - math.log(1 / 4))


def test_a_model_that_lost_too_much_is_refused() -> None:
    """So is one that says NaN; what is kept within the bound is not."""
    before = Measured("merged", -1.0, 2.0)
    gptq._require_kept({"merged": before, "quantised": Measured("gptq", -1.2, 2.0)}, Order("x", "gptq"))
    for logp in (-1.4, math.nan):
        with pytest.raises(ExportError, match="log p of chosen fell"):
            gptq._require_kept({"merged": before, "quantised": Measured("gptq", logp, 2.0)}, Order("x", "gptq"))


def test_what_the_process_says_is_passed_on(tmp_path: Path) -> None:
    """Where the library fails, or is not there, in its own words."""
    job = {"settings": {"method": "gptq"}, "merged": str(tmp_path / "gone"), "out": str(tmp_path)}
    with pytest.raises(ExportError, match=r"--to gptq: GPTQModel failed. Its last words:") as failed:
        gptq._run_apart({**job, "calibration": [], "held_out": []}, tmp_path)
    assert str(failed.value).splitlines()[-1].strip()
    assert "Error" in str(failed.value)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="GPTQModel is not installed: pip install gptqmodel")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_model_in_four_bits(method: str, tmp_path: Path) -> None:
    """The bundled model, quantised for real: what it says of held-out rows is within the bound."""
    source, order = source_of(str(BUNDLED / "model")), Order("x", method, data=rows(tmp_path / "rows.jsonl", 60))
    folder = tmp_path / "out"
    folder.mkdir()
    report = gptq.write(source, folder, ["x"], order, Quiet())["x"]
    assert gptq.check(source, folder, ["x"], order, Quiet()) == {"x": {"problems": []}}
    assert report["held_out"]["merged"]["chosen_logp"] - report["held_out"]["quantised"]["chosen_logp"] < gptq.LOST
    assert json.loads((folder / "trained_with.json").read_text())["stop_tokens"] == [2045, 2046]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
