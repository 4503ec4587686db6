"""`lite plan` as a user types it."""

import json
from pathlib import Path

import pytest
from transformers import Qwen2Config

from lite.cli import main
from lite.recipe import planned_settings
from tests.tiny import write_world

SETTLED = ("--max-length", "64", "--tokens-per-pack", "256", "--recompute-layers", "0", "--quick")  # no search


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the config of a small model, and no weights."""
    folder = tmp_path_factory.mktemp("small")
    Qwen2Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=2048, tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def planned(capsys: pytest.CaptureFixture[str], *typed: str) -> tuple[str, str]:
    """What `lite plan orpo …` prints and says when it goes well."""
    assert main(["plan", "orpo", *typed]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def test_14b_on_24_gb_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    page, said = planned(
        capsys,
        "--model",
        "qwen-14b",
        "--4bit",
        "--vram",
        "24GB",
        "--max-length",
        "2048",
        "--quick",
        "--batch-size",
        "1",
    )
    assert "qwen-14b, nf4, orpo, LoRA r=16, adamw, on rtx-4090, 24.0 GiB" in page
    assert "fits: " in page
    assert " of 22.5 GiB" in page
    for words in ("frozen weights", "█", "layers 6.3 GiB, embedding 1.5 GiB, head 1.5 GiB", "layers recomputed"):
        assert words in page
    assert "longest pair  4,064 tokens (assumed, as long as --max-length allows)" in page
    assert "train     lite orpo --model qwen-14b --4bit --vram 24GB --max-length 2048 --batch-size 1\n" in page
    assert "running steps of a few layers" in said


def test_every_weight(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The header names what is trained and how; weights are not called frozen; in JSON no adapter takes a byte."""
    typed = ("--model", small, "--galore", "--galore-rank", "32", "--vram", "24GB", *SETTLED)
    page, _ = planned(capsys, *typed)
    assert ", bfloat16, orpo, GaLore r=32, 8-bit states, on rtx-4090" in page
    assert "frozen" not in page
    eight = json.loads(planned(capsys, *typed, "--int8-weights", "--json")[0])
    # Of two layers: a byte and a 128th of 4 for a weight, 2 for what is no matrix.
    matrices, vectors = 2 * 256 * (2 * 256 + 2 * 128 + 3 * 512), 2 * (2 * 256 + 256 + 2 * 128)
    assert eight["weights"]["layers"] == matrices * (1 + 4 / 128) + 2 * vectors
    assert (eight["parts"]["adapters"], eight["parts"]["projections"] > 0) == (0, True)


def test_full_training_by_adamw_needs_fp32(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Else it is refused as a run would be."""
    assert main(["plan", "orpo", "--model", small, "--full", "--vram", "24GB"]) == 2
    assert "--dtype float32" in capsys.readouterr().err
    typed = ("--model", small, "--full", "--vram", "24GB", "--dtype", "float32", *SETTLED)
    page, _ = planned(capsys, *typed, "--optimizer", "galore-torch")
    assert ", float32, orpo, every weight, galore-torch r=128, on" in page


def test_json_is_all_of_stdout(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(planned(capsys, "--model", small, "--card", "l4", "--max-length", "256", "--json")[0])
    assert (told["fits"], told["card"], told["steps"]) == (True, "l4", None)
    assert {"peak_bytes", "budget_bytes", "longest_pair_tokens", "tokens_per_second", "settings", "advice"} <= set(told)
    assert {"weights", "adapters", "optimizer", "activations", "reserve"} <= set(told["parts"])
    assert set(told["settings"]) == set(planned_settings())
    assert told["longest_pair_tokens"] > 1000
    assert told["tokens_per_second"] > 0


def test_what_does_not_fit_is_no_error_and_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    """Head and embedding of a 70B alone are more than 2 GB."""
    typed = ("--model", "llama-70b", "--4bit", "--vram", "2GB", "--max-length", "256", "--lora-r", "8", "--quick")
    page, _ = planned(capsys, *typed, "--optimizer", "adamw-8bit", "--batch-size", "1")
    assert "does not fit: " in page
    assert "it would fit with a card with " in page
    assert "train     " not in page


def test_the_longest_pair(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    typed = ("--model", small, "--vram", "2GB", "--max", "--chunk-tokens", "4096", "--mlp-tile-tokens", "0")
    told = json.loads(planned(capsys, *typed, "--no-offload-checkpoints", "--json")[0])
    first, second = told["levers"]
    assert (first["words"], second["words"]) == ("recomputed layers", "the input embedding on the host")
    assert told["longest_pair_tokens"] == second["tokens"] >= first["tokens"] > 1000
    assert second["peak_bytes"] <= 2 * 2**30


@pytest.mark.parametrize("name", ["x.html", "x.png"])
def test_a_sweep_is_a_table_and_a_plot(
    name: str, small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    typed = ("--model", small, "--vram", "24GB", "--sweep", "max-length=256..1024", "--batch-size", "1")
    page, _ = planned(capsys, *typed, "--plot", str(file))
    lines = [line.split()[:2] for line in page.splitlines()]
    assert [line for line in lines if line and line[-1] == "yes"] == [["256", "yes"], ["512", "yes"], ["1,024", "yes"]]
    assert f"plot      {file}" in page
    assert file.stat().st_size > 1000
    if name == "x.png":
        told = json.loads(planned(capsys, *typed[:-4], "--sweep", "max-length=256,300", "--json")[0])
        assert [one["max_length"] for one in told] == [256, 300]
        assert told[0]["tokens_per_pack"] < told[1]["tokens_per_pack"]


def test_data_names_its_longest_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And its number of steps. A sweep of what rows become reads them anew for each value."""
    world = write_world(tmp_path)
    typed = ("--model", str(world / "model"), "--data", str(world / "pairs.jsonl"), "--device", "cpu", "--quick")
    page, _ = planned(capsys, *typed, "--dtype", "float32")
    assert "pairs.jsonl:" in page
    assert " steps in " in page
    told = json.loads(planned(capsys, *typed, "--sweep", "batch-size=1,8", "--json")[0])
    assert told[1]["steps"] < told[0]["steps"]


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        ([], "for which method? Expected one of "),
        (["orp"], "no such loss in lite"),
        (["orpo", "--model", "qwen-14b", "--card", "rtx-409"], "Did you mean rtx-4090?"),
        (["orpo", "--model", "qwen-14b", "--vram", "lots"], "--vram = 'lots': expected a size such as 24GB."),
        (["orpo", "--model", "qwen-14b", "--plot", "x.html"], "--plot draws what --sweep finds."),
        (["orpo", "--model", "qwen-14b", "--sweep", "max-length"], "expected max-length=1024..65536"),
        (["orpo", "--model", "qwen-14b", "--sweep", "max-length=9..8"], "expected max-length=1024..65536"),
        (["orpo", "--model", "qwen-14b", "--sweep", "beta=1..2"], "'beta' is no whole number of a recipe."),
        (["orpo", "--model", "qwen-14b", "--sweep", "max-length=4,8", "--vram", "1GB"], "max_length = 4: expected"),
        (["orpo", "--model", "qwen-14b", "--sweep", "lora-r=1..2", "--max"], "--sweep beside --max"),
        (["orpo", "--model", "qwen-15b", "--vram", "24GB"], "no such folder or alias. Did you mean qwen-"),
        (["orpo", "--model", "qwen-14b", "--device", "cpu", "--card", "l4"], "device = cpu beside a card"),
    ],
    ids=str,
)
def test_what_cannot_be_planned(typed: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *typed]) == 2
    said = capsys.readouterr()
    assert problem in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    assert "Usage: lite plan METHOD" in capsys.readouterr().out
    assert main(["plan", "orpo", "--help"]) == 0
    page = capsys.readouterr().out
    for flag in ("--card NAME", "--[no-]quick", "--[no-]max", "--sweep KEY=A..B", "--plot FILE", "--beta", "--vram"):
        assert flag in page
