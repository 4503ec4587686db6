"""The run's folder: its name, when it is taken, and what a resume compares."""

import copy
from pathlib import Path

import pytest

from lite.errors import RunError
from lite.recipe import Recipe
from lite.train import run

IDENTITY = {
    "recipe": {"method": "orpo", "learning_rate": 1e-5, "max_steps": None},
    "steps": 7,
    "data": "digest",
    "model": {"name": "m", "files": {"config.json": 10}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    run.create(tmp_path / "run", Recipe(), IDENTITY, {run.LEDGER: {"kept": 1}}, skipped=["pairs.jsonl:3: no keys"])
    return tmp_path / "run"


def test_default_names_are_distinct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs within a second, as a sweep starts them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.time, "strftime", lambda form: "20260102-030405")
    made = [run.new_folder(Recipe(model="org/Some Model")) for _ in range(3)]
    assert made == [Path("runs") / f"orpo-Some-Model-20260102-030405{suffix}" for suffix in ("", "-2", "-3")]
    assert all(folder.is_dir() for folder in made)


def test_a_folder_that_holds_a_run_is_taken(folder: Path) -> None:
    with pytest.raises(RunError, match=rf"holds a run already. Go on with it by `lite resume {folder}`"):
        run.require_free(Recipe(output_dir=str(folder)))


def test_an_empty_folder_is_free_and_a_file_is_not(tmp_path: Path) -> None:
    recipe = Recipe(output_dir=str(tmp_path))
    run.require_free(recipe)
    assert run.new_folder(recipe) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="a file is there"):
        run.require_free(Recipe(output_dir=str(tmp_path / "file")))
    with pytest.raises(RunError, match="no run can be written there: Not a directory"):
        run.new_folder(Recipe(output_dir=str(tmp_path / "file" / "below")))


def test_a_folder_that_cannot_be_written_to_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them exist is the system's affair; that nobody may write is said by a system that is asked."""
    monkeypatch.setattr(run.os, "access", lambda path, mode: path != tmp_path)
    for name in (tmp_path, tmp_path / "new" / "run"):
        with pytest.raises(RunError, match=f"no run can be written there: {tmp_path} cannot be written to"):
            run.require_free(Recipe(output_dir=str(name)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="runs: no run can be written there"):
        run.require_free(Recipe())


def test_what_ends_a_run_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    spaced = folder.rename(tmp_path / "my run")
    with pytest.raises(RunError, match=r"the run stopped: .*No space left") as caught, run.going_on(spaced):
        raise OSError(28, "No space left on device")
    assert f"`lite resume '{spaced}'`: its checkpoints are whole" in str(caught.value)
    with (
        pytest.raises(KeyboardInterrupt, match=f"from the last checkpoint: lite resume '{spaced}'"),
        run.going_on(spaced),
    ):
        raise KeyboardInterrupt
    (spaced / "recipe.yaml").unlink()
    with pytest.raises(RunError, match="start again: no step was taken"), run.going_on(spaced):
        raise OSError(28, "No space left on device")


def test_two_processes_do_not_train_in_one_folder(folder: Path) -> None:
    with run.alone(folder), pytest.raises(RunError, match="another process is training there"), run.alone(folder):
        pytest.fail("both have it")
    with run.alone(folder):
        pass


def test_create_can_be_read_back(folder: Path) -> None:
    assert run.opened(folder).resolved() == Recipe().resolved()
    assert run.planned_steps(folder) == 7
    assert run.result(folder) is None
    assert (folder / "rows_skipped.txt").read_text(encoding="utf-8") == "pairs.jsonl:3: no keys\n"
    assert not [path for path in folder.iterdir() if path.name.startswith(".") and path.name != run.LOCK]


def test_no_run_is_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run is there. Expected the folder of a run, with its recipe.yaml"):
        run.opened(tmp_path)


def test_the_same_may_go_on(folder: Path) -> None:
    run.require_same(folder, copy.deepcopy(IDENTITY))


def test_everything_that_changed_is_named_at_once(folder: Path) -> None:
    now = copy.deepcopy(IDENTITY)
    now["recipe"]["learning_rate"] = 2e-5
    now["recipe"]["data"] = "other.jsonl"
    now["data"] = "another digest"
    now["model"]["files"] = {"config.json": 11}
    with pytest.raises(RunError) as caught:
        run.require_same(folder, now)
    message = str(caught.value)
    assert "learning_rate: was 1e-05, is 2e-05" in message
    assert "the rows of other.jsonl" in message
    assert "model: files: was {'config.json': 10}, is {'config.json': 11}" in message
    assert "--max-steps" in message


def test_a_setting_that_an_earlier_lite_had_not_was_at_its_default(folder: Path) -> None:
    """The run of IDENTITY knows of three settings; today's recipe has all."""
    now = {"recipe": {**Recipe().resolved(), **IDENTITY["recipe"]}}
    run.require_same(folder, now)
    for key, was, value in (("galore_rank", 128, 8), ("full", False, True), ("nll_over", "'completion'", "sequence")):
        changed = {"recipe": {**now["recipe"], key: value}}
        with pytest.raises(RunError, match=f"{key}: was {was}, is {value!r} in recipe.yaml"):
            run.require_same(folder, changed)


def test_other_weights_of_the_same_size_are_told_apart(tmp_path: Path, folder: Path) -> None:
    """By their mark; a run of an earlier lite has none, and goes on."""
    now = copy.deepcopy(IDENTITY)
    now["model"]["weights"] = "plain:2"
    run.require_same(folder, now)
    before = copy.deepcopy(now)
    before["model"]["weights"] = "plain:1"
    run.write_json(folder / run.IDENTITY, before)
    with pytest.raises(RunError, match="model: weights: was 'plain:1', is 'plain:2'"):
        run.require_same(folder, now)


def test_max_steps_changes_by_name_only(folder: Path) -> None:
    now = copy.deepcopy(IDENTITY)
    now["recipe"]["max_steps"] = 9
    with pytest.raises(RunError, match="max_steps: was None, is 9"):
        run.require_same(folder, now)
    run.require_same(folder, now, but="max_steps")


def test_another_environment_is_told(folder: Path) -> None:
    run.write_json(folder / run.ENVIRONMENT, {"torch": "2.11.0", "threads": 1})
    notes: list[str] = []
    run.note_environment(folder, {"torch": "2.13.0", "threads": 1}, notes.append)
    assert notes == ["another environment than the run began in: torch 2.11.0 → 2.13.0"]
