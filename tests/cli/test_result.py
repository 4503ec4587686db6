"""What is on stdout when it has trained."""

import json

import pytest

from lite.cli import result

RESULT = {
    "run": "runs/one",
    "steps": 3,
    "seconds": 62.0,
    "peak_bytes": 3 * 2**30,
    "eval_before": {"eval_loss": 2.0, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": -0.01},
    "eval_after": {"eval_loss": 1.0, "eval_rewards/accuracies": 0.975, "eval_rewards/margins": 0.02},
}
SAMPLES = [{"place": "x:1", "prompt": "2 + 2?", "before": "Well, [bold]it is\x1b[31m 4.", "after": "4."}]


def test_json_is_one_line_of_json_even_of_nan() -> None:
    line = result.as_json(RESULT | {"eval_after": {"eval_loss": float("nan")}})
    assert "\n" not in line
    assert json.loads(line) == RESULT | {"eval_after": {"eval_loss": None}}


def test_page(capsys: pytest.CaptureFixture[str]) -> None:
    result.page(RESULT, SAMPLES, ["adapter   runs/one/adapter"])
    text = capsys.readouterr().out
    assert "runs/one: 3 steps in 1 min 2 s, 3.00 GiB at most" in text
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["accuracy: preferred as labelled"][-2:] == ["50.0%", "97.5%"]
    assert rows["loss"][-2:] == ["2.0000", "1.0000"]
    assert "2 + 2?" in text
    assert text.endswith("adapter   runs/one/adapter\n")


def test_what_a_model_says_is_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither rich's markup nor a terminal's escape sequences are obeyed."""
    result.page(RESULT, SAMPLES, [])
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "[bold]it is" in text


def test_without_held_out_rows_there_is_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    result.page(RESULT | {"eval_before": {}, "eval_after": {}}, [], [])
    assert "before" not in capsys.readouterr().out
