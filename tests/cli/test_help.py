"""Help pages: whole flags, types, limits, defaults and units, in any width."""

import re

import pytest

from lite import signatures
from lite.cli import main, options
from lite.recipe import Recipe


def page(verb: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([verb, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_no_flag_is_cut_short(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page("orpo", columns, monkeypatch, capsys)
    for setting in options.settings(signatures.find("orpo")):
        assert f"  {setting.left}" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("  --")) <= columns


def test_type_limits_default_and_unit_are_in_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(page("orpo", 100, monkeypatch, capsys).split())
    for line in (
        "--lora-r INTEGER Rank of the adapter. [at least 1; default: 16]",
        "[at least 8; default: 2048 tokens]",
        "--max-steps INTEGER Stop after so many optimizer steps. [at least 1; steps]",
        "--[no-]offload-checkpoints The inputs of recomputed layers wait",
        "--dtype auto|bfloat16|float32 Compute type",
        "--nll-over completion|sequence Tokens of the NLL",
        "in a recipe: load_in_4bit",
        "--columns KEY=NAME,… Your names of the columns",
        "Full training --[no-]galore Short for --full --optimizer galore",
        "--galore-projection sketch|svd|eigh|random How a subspace is found",
    ):
        assert line in text


def test_every_panel_of_the_recipe_is_there_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = page("simpo", 80, monkeypatch, capsys).splitlines()
    panels = {field.json_schema_extra["panel"] for field in Recipe.model_fields.values()} - {"Method"}
    for panel in ("SIMPO", "Command", *panels):
        assert lines.count(panel) == 1


@pytest.mark.parametrize("method", list(signatures.registered()))
def test_the_losss_own_learning_rate_is_shown(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(page(method, 80, monkeypatch, capsys).split())
    rate = re.search(r"--learning-rate NUMBER .*? default: ([^\]]+)\]", text)
    assert float(rate.group(1)) == signatures.find(method).learning_rate


def test_the_equation_and_its_source_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page("orpo", 80, monkeypatch, capsys)
    assert "loss = NLL(chosen)" in text
    assert "arXiv:2403.07691" in text
    assert "\x1b" not in text
