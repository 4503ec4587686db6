"""`lite profile` as a user types it."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lite.cli import main
from tests.tiny import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def arguments(world: Path, *more: str) -> list[str]:
    model, data = str(world / "model"), str(world / "pairs.jsonl")
    return ["profile", "orpo", "--model", model, "--data", data, "--dtype", "float32", "--steps", "1", *more]


def test_for_people_a_page_and_a_plot(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments(world)) == 0
    said = capsys.readouterr()
    assert "measuring a step" in said.err
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("profile-orpo-model-")
    for words in (
        "time of a step",
        "backward",
        "memory at the peak, in",
        "weights",
        f"runs/{folder.name}/timeline.html",
    ):
        assert words in said.out
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "timeline.html").read_text(encoding="utf-8")
    HTMLParser().feed(page)
    assert "live memory" in page
    assert not (folder / "recipe.yaml").exists()  # no run, which could be resumed


def test_json_is_all_of_stdout(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(world, "--prove", "-o", str(tmp_path / "p"), "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "p" / "profile.json").read_text(encoding="utf-8"))
    assert result["proved"]
    assert (result["profile"], result["steps"]) == (str(tmp_path / "p"), 1)


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ([], "for which method? Expected one of "),
        (["orp"], "no such loss in lite"),
        (["orpo", "--steps", "many"], "--steps = 'many': expected a whole number, at least 1."),
        (["orpo", "--steps", "0"], "--steps = 0: expected"),
        (["orpo", "--prov"], "Did you mean --prove?"),
        (["orpo", "--output-dir", "x"], "A profile goes where --output says."),
    ],
)
def test_what_cannot_be_profiled(typed: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *typed]) == 2
    said = capsys.readouterr()
    assert problem in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--help"]) == 0
    assert "Usage: lite profile METHOD" in capsys.readouterr().out
    assert main(["profile", "orpo", "--help"]) == 0
    page = capsys.readouterr().out
    for flag in ("--steps INTEGER", "--[no-]prove", "--output FOLDER", "--beta", "--tokens-per-pack"):
        assert flag in page
