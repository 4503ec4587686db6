"""A run as a user types it, with the bundled model: what is left, and what is said where."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lite import recipe as recipes
from lite.cli import main, session
from lite.cli.training import BUNDLED_RECIPE
from lite.recipe import Recipe
from lite.train import Run

MODEL = BUNDLED_RECIPE.parent / "model"
pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="the bundled model has not been made")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on eight pairs."""
    folder = tmp_path_factory.mktemp("session")
    rows = (BUNDLED_RECIPE.parent / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "pairs.jsonl").write_text("\n".join(rows[:8]), encoding="utf-8")
    (folder / "held_out.jsonl").write_text("\n".join(rows[8:12]), encoding="utf-8")
    return folder / "run"


def arguments(run: Path) -> list[str]:
    data = ["--data", str(run.parent / "pairs.jsonl"), "--eval-data", str(run.parent / "held_out.jsonl")]
    few = ["--max-steps", "2", "--batch-size", "4", "--samples", "1", "--dtype", "float32", "--lora-r", "4"]
    return ["orpo", *data, *few, "--output-dir", str(run)]


def test_json_then_the_same_run_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """stdout is the result and nothing else; progress is on stderr; a second run does not overwrite the first."""
    code = "import sys; from lite.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *arguments(run), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["run"], result["steps"]) == (str(run), 2)
    assert result.keys() == {"run", "steps", "seconds", "peak_bytes", "packing", "eval_before", "eval_after"}
    for when in ("eval_before", "eval_after"):
        assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"} <= result[when].keys()
    assert "step 2/2" in done.stderr
    assert "kept 12 of 12 rows" in done.stderr
    assert all(character.isprintable() or character == "\n" for character in done.stderr)
    recipe = recipes.load(run / "recipe.yaml")
    assert (recipe.lora_r, recipe.max_steps, recipe.dtype) == (4, 2, "float32")

    assert main(arguments(run)) == 2
    said = capsys.readouterr()
    assert f"lite resume {run}" in said.err
    assert said.out == ""

    assert main(["resume", str(run)]) == 0
    page = capsys.readouterr().out
    assert "held-out rows" in page
    assert "before" in page
    assert str(run / "adapter").replace("\n", "") in page
    assert f"lite orpo --model bundled --run {run}" in page
    assert f"lite score --run {run} " in page


def test_every_weight_as_a_user_types_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Planned, trained, told as JSON and as a page: a run of GaLore that leaves a model."""
    folder = run.with_name("whole")
    typed = [*arguments(folder)[:-4], "--output-dir", str(folder)]  # all but the adapter's rank
    assert main([*typed, "--galore", "--galore-rank", "8", "--int8-weights", "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert (result["run"], result["steps"], result["model"]) == (str(folder), 2, str(folder / "model"))
    for told in (
        "plan: fits",
        "weights are trained; the input embedding and the head stay",
        "disk: checkpoints and the",
    ):
        assert told in said.err
    assert (recipes.load(folder / "recipe.yaml").optimizer, (folder / "adapter").exists()) == ("galore", False)

    assert main(["resume", str(folder)]) == 0
    page = capsys.readouterr().out
    assert f"model     {folder}/model" in page
    assert (
        f"lite orpo --model {folder}/model --galore --int8-weights --dtype float32 --galore-rank 8 --data MORE.jsonl"
        in page
    )
    assert main(["score", "--run", str(folder / "model")]) == 2
    assert f"`--run {folder}` or `--model {folder}/model`" in capsys.readouterr().err


def test_rows_that_cannot_be_read_end_it_before_there_is_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "chosen": \n', encoding="utf-8")
    assert main(["orpo", "--data", str(data), "--output-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert f"{data}:1" in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(tmp_path / "none")]) == 2
    assert "no run is there" in capsys.readouterr().err


def test_what_to_type_next_is_of_this_run(tmp_path: Path) -> None:
    """Its loss, settings other than defaults, reference; rows are named where the run has none of its own."""
    settings = {"loss": "dpo:1.0,sft:0.2", "dpo.beta": 0.3, "dpo.length_normalised": True, "data": "my pairs.jsonl"}
    recipe = Recipe(method="dpo", model="tiny", ref="other", **settings)
    adapter, judged, talk, export, train_on = session.following(Run(tmp_path, recipe, {"eval_after": {}}))
    assert adapter.endswith(str(tmp_path / "adapter"))
    assert judged == f"judge it  lite score --run {tmp_path} --data 'my pairs.jsonl' --ref other"
    assert talk == f"talk      lite chat {tmp_path}"
    assert f"lite export {tmp_path} --to gguf" in export
    same = "--model tiny --loss dpo:1.0,sft:0.2 --ref other --dpo.beta 0.3 --dpo.length-normalised"
    assert train_on == f"train on  lite dpo {same} --run {tmp_path} --data MORE.jsonl"


def test_what_to_type_next_of_whole_weights(tmp_path: Path) -> None:
    """No merge; training on is by the model that was left, and in the same way."""
    recipe = Recipe(galore=True, int8_weights=True, model="tiny", data="more.jsonl")
    model, judged, _, export, train_on = session.following(Run(tmp_path, recipe, {"eval_after": {}}))
    assert model.endswith(str(tmp_path / "model"))
    assert judged == f"judge it  lite score --run {tmp_path} --data more.jsonl"
    assert export == f"export    lite export {tmp_path} --to gguf --type q4_k_m"
    assert train_on == f"train on  lite orpo --model {tmp_path}/model --galore --int8-weights --data MORE.jsonl"
    *_, by_adamw = session.following(Run(tmp_path, Recipe(full=True, dtype="float32"), {"eval_after": {}}))
    same = "--full --optimizer adamw --dtype float32"
    assert by_adamw == f"train on  lite orpo --model {tmp_path}/model {same} --data MORE.jsonl"
