"""`lite precompute` as a user types it: what it says where, what it costs again, and what Ctrl-C leaves."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lite.cli import main, progress
from tests.tiny import write_world

LITE = [sys.executable, "-c", "import sys; from lite.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def arguments(world: Path, cache: Path, *more: str) -> list[str]:
    model, data = str(world / "model"), str(world / "pairs.jsonl")
    return ["precompute", "dpo", "--model", model, "--data", data, "--dtype", "float32", "--cache", str(cache), *more]


def test_json_is_all_of_stdout_and_a_second_call_computes_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(world, tmp_path / "cache", "--json")) == 0
    said = capsys.readouterr()
    first = json.loads(said.out)
    assert (first["rows"], first["computed"], first["reused"]) == (20, 20, 0)
    assert first.keys() == {"rows", "computed", "reused", "seconds", "cache", "identity"}
    assert first["cache"] == str(tmp_path / "cache" / "reference.sqlite")
    assert "reading the reference's log-probs" in said.err

    assert main(arguments(world, tmp_path / "cache", "--json")) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) | {"seconds": 0} == first | {"computed": 0, "reused": 20, "seconds": 0}
    assert "as the reference" not in said.err  # the model is not even loaded


def test_for_people_it_says_what_to_type_next(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With every setting that was given: another quantisation or dtype would be another reference."""
    typed = arguments(world, tmp_path / "a cache", "--chunk-tokens", "64")
    assert main(typed) == 0
    first, following = capsys.readouterr().out.splitlines()
    assert first == f"20 rows in {tmp_path / 'a cache' / 'reference.sqlite'}: 20 computed, 0 found there"
    assert following.startswith("next      lite dpo --model ")
    assert following.endswith(f"--dtype float32 --cache '{tmp_path / 'a cache'}' --chunk-tokens 64")


def test_progress_has_rows_a_second_and_the_time_left(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr; the first line is the first pack's, which nobody has timed."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    assert main(arguments(world, tmp_path / "cache", "--tokens-per-pack", "256")) == 0
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if re.search(r"\d/20 rows", line)]
    assert len(lines) > 3
    assert re.fullmatch(r"\d/20 rows", lines[0])
    for line in lines[1:-1]:
        assert re.fullmatch(r"\d+/20 rows  [\d,.]+ rows/s  \d+ s left", line)
    assert re.fullmatch(r"20/20 rows  [\d,.]+ rows/s  done", lines[-1])


def test_after_ctrl_c_the_same_command_goes_on(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 130 and a word; what was computed is not computed again."""
    data = tmp_path / "many.jsonl"
    answers = {"chosen": "yes " * 20, "rejected": "no " * 20}
    data.write_text("".join(json.dumps({"prompt": f"Is {n} more?", **answers}) + "\n" for n in range(200)))
    command = [*LITE, *arguments(world, tmp_path / "cache", "--data", str(data), "--tokens-per-pack", "512", "--json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **streams) as process:
        for line in process.stderr:
            if "/200 rows" in line:
                process.send_signal(signal.SIGINT)
                break
        out, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert out == ""
    assert said.splitlines()[-1] == ("stopped. What was computed is in the cache; the same command goes on from there.")
    assert main(command[len(LITE) :]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == found["computed"] + found["reused"] == 200
    assert found["reused"] > 0
    assert found["computed"] > 0


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ([], "for which method? Expected one of apo_zero"),
        (["--json"], "for which method?"),
        (["dop"], "no such loss in lite. Did you mean dpo?"),
        (["orpo"], "orpo: has no reference to read before training. Those that have: "),
        (["dpo", "--ref-columns", "--data", "x.jsonl"], "the data brings its reference, so none is read"),
        (["dpo", "--modle", "x"], "--modle: no such option. Did you mean --model?"),
        (["dpo", "--top-k", "8"], "dpo does not learn from the reference's words"),
    ],
)
def test_what_cannot_be_precomputed(typed: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["precompute", *typed]) == 2
    said = capsys.readouterr()
    assert problem in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a method which there are; with one its own options."""
    assert main(["precompute", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "METHOD: apo_zero, " in page
    assert "Usage: lite precompute METHOD" in page
    assert main(["precompute", "kto", "--help"]) == 0
    page = capsys.readouterr().out
    for flag in ("--desirable-weight", "--ref TEXT", "--cache", "--[no-]json", "--[no-]4bit"):
        assert flag in page
