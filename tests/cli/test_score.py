"""`lite score` and then `lite what-if`, typed with the bundled model: what is on stdout, and what beside it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lite.cli import main, score
from lite.cli.training import BUNDLED_RECIPE
from lite.recipe import Recipe

MODEL = BUNDLED_RECIPE.parent / "model"
pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="the bundled model has not been made")
COMMAND = [sys.executable, "-c", "import sys; from lite.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four bundled pairs with a broken row among them, and the same in good order."""
    folder = tmp_path_factory.mktemp("score")
    rows = (BUNDLED_RECIPE.parent / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "pairs.jsonl").write_text("\n".join([*rows[:2], '{"prompt": ', *rows[2:4]]), encoding="utf-8")
    (folder / "good.jsonl").write_text("\n".join(rows[:4]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A DPO run of two steps on these pairs, held out as well."""
    data = ["--data", str(folder / "good.jsonl"), "--eval-data", str(folder / "good.jsonl"), "--dtype", "float32"]
    few = ["--max-steps", "2", "--batch-size", "4", "--samples", "0", "--lora-r", "4", "--cache", str(folder / "cache")]
    assert main(["dpo", "--model", "bundled", *data, *few, "--output-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_json_is_a_line_for_each_row_and_the_summary(folder: Path) -> None:
    """stdout is lines and nothing else, in the file's order, the bad row among them; progress is on stderr."""
    arguments = ["score", "--data", str(folder / "pairs.jsonl"), "--skip-bad-rows", "--json", "--dtype", "float32"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, last = map(json.loads, done.stdout.splitlines())
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 5]
    assert ["skipped" in line for line in lines] == [False, False, True, False, False]
    assert last.keys() == {"summary"}
    assert (last["summary"]["rows"], last["summary"]["skipped"]) == (5, 1)
    assert last["summary"]["mean_margin"] == pytest.approx(
        sum(line["chosen_logps"] - line["rejected_logps"] for line in lines if "skipped" not in line) / 4
    )
    for said in ("kept 4 of 5 rows (1 skipped as bad)", "self-check: equal", "5/5 rows"):
        assert said in done.stderr


def test_head_takes_what_it_wants(folder: Path) -> None:
    """The reader goes after one line: no traceback, status 0."""
    arguments = ["score", "--data", str(folder / "good.jsonl"), "--json", "--tokens-per-pack", "8"]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        assert json.loads(process.stdout.readline())["row"] == 1
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert "Traceback" not in said


def test_a_run_beside_its_start_then_what_if(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    cache = ["--cache", str(run.parent / "cache")]
    assert main(["score", "--run", str(run), "--ref", "start", *cache]) == 0
    page = capsys.readouterr().out
    for words in (
        "bundled with",
        "chosen has more reward",
        "margin of rewards",
        "good.jsonl:",
        "rows that it doubts most, by the margin of rewards",
    ):
        assert words in page
    assert f"lite what-if {run}" in page.replace("\n", "")

    assert main(["score", "--run", str(run), "--ref", "start", *cache, "--json"]) == 0
    *_, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert main(["what-if", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["reference"]) == (4, "run")
    assert {one["step"] for one in found["outcomes"]} == {2}
    (own,) = (one for one in found["outcomes"] if one["own"])
    assert (own["method"], own["beta"]) == ("dpo", last["summary"]["beta"])
    assert own["rewards/margins"] == pytest.approx(last["summary"]["rewards/margins"], abs=1e-5)


def test_what_if_as_tables(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    assert main(["what-if", str(run), "--loss", "dpo,ipo,simpo", "--beta", "0.1,0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "step 2: 4 held-out rows" in " ".join(lines)
    for title in ("loss", "saturated rows", "gradient weight"):
        table = lines[lines.index(title) :]
        assert table[1].split() == ["beta", "0.1", "0.5"]
        assert [line.split()[0] for line in table[2:7]] == ["dpo", "dpo", "dpo", "ipo", "simpo"]
        assert " *" in table[2]
    assert main(["what-if", str(run), "--steps"]) == 0
    table = capsys.readouterr().out
    assert "steps 0 to 2" in table
    assert table.count("0.1 *") == 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["score", "--run", "nowhere"], "nowhere: no run is there"),
        (["score", "--beta", "-1"], "--beta = -1.0: expected a number, at least 0."),
        (["score", "--max-length", "1", "--4bit", "--8bit"], "--max-length = 1: expected a whole number, at least 8"),
        (["score", "--learning-rate", "1"], "--learning-rate: no such option"),
        (["score", "--ref-adapter", "there"], "--ref-adapter = 'there' without ref"),
        (["what-if"], "RUN"),
        (["what-if", "nowhere"], "nowhere: no run is there"),
        (["what-if", "nowhere", "--beta", "0.1,x"], "--beta = '0.1,x': expected numbers above 0"),
        (["what-if", "nowhere", "--step", "last"], "--step = 'last': expected a whole number"),
        (["what-if", "nowhere", "--steps", "--step", "3"], "--steps beside --loss or --step"),
    ],
)
def test_what_cannot_be_followed(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert problem in said.err
    assert "Traceback" not in said.err


def test_options_are_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    """Types, defaults and limits are the recipe's; every one that is offered is a setting or a hyperparameter."""
    settings = {setting.key: setting for setting in score.settings()}
    assert settings.keys() - {"json", "beta"} <= Recipe.model_fields.keys()
    assert settings.keys() >= score.KEYS
    assert score.OTHERWISE.keys() <= settings.keys()
    assert main(["score", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "--max-length INTEGER Longest prompt and completion together. [at least 8; default: 2048 tokens]" in page
    assert "--lora-r" not in page
