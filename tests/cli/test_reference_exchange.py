"""`lite reference export|import`: columns that a run takes as its reference, and caches that go from place to place."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from lite.cli import main
from lite.reference.rows import Row
from lite.reference.store import Store
from lite.reference.weights import Identity, completion_key
from tests.tiny import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, another of other weights beside it, and a cache of the first."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    shutil.copytree(folder / "model", folder / "other")
    tensors = load_file(folder / "other" / "model.safetensors")
    tensors["model.norm.weight"] *= 0.5
    save_file(tensors, folder / "other" / "model.safetensors", metadata={"format": "pt"})
    return folder


def of(world: Path, *more: str) -> list[str]:
    """The settings that every command here has; a later flag wins."""
    settings = ["--model", str(world / "model"), "--data", str(world / "pairs.jsonl"), "--dtype", "float32"]
    return [*settings, "--cache", str(world / "cache"), *more]


def exported(world: Path, method: str, *more: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The rows that come out on stdout."""
    assert main(["reference", "export", method, *of(world, *more)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def result(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def conversations(path: Path) -> Path:
    """Rows of 3 turns: the second one's must be cut to fit 96 tokens, and of the third even the last is too long."""
    with path.open("w", encoding="utf-8") as file:
        for n, (first, last) in enumerate([(4, 4), (60, 4), (4, 120), *[(4, 4)] * 30]):
            turns = [("user", "a" * first), ("assistant", "b"), ("user", f"{n} " + "c" * last)]
            row = {"prompt": [{"role": role, "content": said} for role, said in turns], "chosen": "y", "rejected": "n"}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_run_on_the_columns_starts_where_a_run_beside_the_reference_does(
    world: Path, tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another model as the reference, so that no log ratio is 0; held-out rows come from the same file in both."""
    file = tmp_path / f"rows.{ending}"
    other = of(world, "--ref", str(world / "other"))
    assert main(["reference", "export", "dpo", *other, "-o", str(file)]) == 0
    said = capsys.readouterr().out
    assert f"{file}: 20 rows, with ref_chosen_logps and ref_rejected_logps of {world / 'other'}, float32" in said
    assert f"lite dpo --model {world / 'model'} --dtype float32 --data {file} --ref-columns" in said

    few = ["--max-steps", "1", "--samples", "0", "--lora-r", "2"]
    beside = result(["dpo", *other, *few, "--output-dir", str(tmp_path / "beside")], capsys)
    columns = of(world, "--data", str(file), "--ref-columns", *few, "--output-dir", str(tmp_path / "columns"))
    alone = result(["dpo", *columns], capsys)
    assert abs(beside["eval_before"]["eval_loss"] - 0.6931) > 1e-3
    for name, value in beside["eval_before"].items():
        assert alone["eval_before"][name] == pytest.approx(value, abs=2e-5), name
    first = [lines(tmp_path / name / "metrics.jsonl")[0] for name in ("beside", "columns")]
    assert first[0].keys() == first[1].keys()
    steps = [
        next(line for line in lines(tmp_path / name / "metrics.jsonl") if "loss" in line)
        for name in ("beside", "columns")
    ]
    assert steps[1]["loss"] == pytest.approx(steps[0]["loss"], abs=2e-5)


def test_the_rows_stand_in_their_order_as_they_were(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out ones too; totals are the sums of the tokens; another column of the user's stays."""
    own = [{**row, "id": n} for n, row in enumerate(lines(world / "pairs.jsonl"))]
    (world / "own.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in own))
    found = exported(world, "dpo", "--tokens", "--data", str(world / "own.jsonl"), capsys=capsys)
    assert [{name: row[name] for name in own[0]} for row in found] == own
    for row in found:
        for name in ("chosen", "rejected"):
            tokens = torch.tensor(row[f"ref_{name}_tokens"], dtype=torch.float64)
            assert row[f"ref_{name}_logps"] == tokens.sum().item()
            assert len(tokens) == len(row[name].encode()) + 1  # a byte is a token, and one ends the turn


def test_the_same_numbers_as_plain_transformers(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    row = exported(world, "dpo", capsys=capsys)[3]
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    question = [{"role": "user", "content": row["prompt"]}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    for name in ("chosen", "rejected"):
        prompt, whole = (
            tokenizer(text, return_tensors="pt").input_ids for text in (asked, f"{asked}{row[name]}<|im_end|>")
        )
        logps = model(whole).logits[0, :-1].log_softmax(-1).gather(-1, whole[0, 1:, None])[prompt.shape[1] - 1 :]
        assert row[f"ref_{name}_logps"] == pytest.approx(logps.sum().item(), abs=1e-4)


def test_rows_that_are_not_learned_from_as_they_stand_are_left_out(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cut prompt is not the row's: its columns would be those of another text."""
    data = conversations(tmp_path / "talks.jsonl")
    with data.open("a") as file:
        file.write("no row\n")
    limits = ["--max-length", "96", "--skip-bad-rows"]
    settings = of(world, "--data", str(data), *limits)
    found = result(["reference", "export", "dpo", *settings, "-o", str(tmp_path / "out.jsonl")], capsys)
    assert (found["rows"], found["left_out"]) == (31, 3)
    kept = [row for n, row in enumerate(lines_of_talks(data)) if n not in (1, 2)]
    written = lines(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in written] == [row["prompt"] for row in kept]
    # As it is, the file is what --ref-columns takes.
    ready = of(world, "--data", str(tmp_path / "out.jsonl"), "--max-length", "96", "--ref-columns", "--max-steps", "1")
    assert main(["dpo", *ready, "--samples", "0", "--output-dir", str(tmp_path / "run")]) == 0


def test_a_file_of_cut_prompts_has_no_rows_to_write(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = conversations(tmp_path / "talks.jsonl").read_text().splitlines()
    (tmp_path / "talks.jsonl").write_text(f"{lines[1]}\n{lines[1].replace('1 c', '2 c')}\n")
    settings = of(world, "--data", str(tmp_path / "talks.jsonl"), "--max-length", "96")
    assert main(["reference", "export", "dpo", *settings]) == 2
    said = capsys.readouterr()
    assert "the prompt of every row that is left is cut" in said.err
    assert said.out == ""


def lines_of_talks(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def test_what_is_missing_is_computed_or_told(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ["--cache", str(tmp_path / "cache"), "-o", str(tmp_path / "out.parquet")]
    assert main(["reference", "export", "dpo", *of(world, *cache), "--no-compute"]) == 2
    said = capsys.readouterr().err
    assert f"20 of 20 examples have no log-probs of {world / 'model'}, float32 in {tmp_path / 'cache'}" in said
    assert "Leave out --no-compute" in said
    assert not (tmp_path / "out.parquet").exists()
    first = result(["reference", "export", "dpo", *of(world, *cache)], capsys)
    assert (first["rows"], first["computed"], first["reused"], first["left_out"]) == (20, 20, 0, 0)
    assert first["columns"] == ["ref_chosen_logps", "ref_rejected_logps"]
    again = of(world, *cache, "-o", str(tmp_path / "again.parquet"), "--no-compute")
    found = result(["reference", "export", "dpo", *again], capsys)
    assert (found["rows"], found["computed"], found["identity"]) == (20, 0, first["identity"])
    tables = [pyarrow.parquet.read_table(tmp_path / f"{name}.parquet") for name in ("out", "again")]
    assert tables[0].equals(tables[1])


def test_single_completions_have_their_own_columns(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of KTO also its partner's; a pair that KTO takes apart keeps its names."""
    pairs = lines(world / "pairs.jsonl")
    singles = [{"prompt": p["prompt"], "completion": p["chosen"], "label": n % 2 == 0} for n, p in enumerate(pairs)]
    (tmp_path / "singles.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in singles))
    found = exported(world, "kto", "--data", str(tmp_path / "singles.jsonl"), capsys=capsys)
    assert found[0].keys() == {"prompt", "completion", "label", "ref_completion_logps", "ref_kl_logps"}
    both = exported(world, "kto", capsys=capsys)
    assert {name for name in both[0] if name.startswith("ref_")} == {
        f"ref_{name}_logps" for name in ("chosen", "chosen_kl", "rejected", "rejected_kl")
    }
    dpo = exported(world, "dpo", capsys=capsys)
    for row, single, pair in zip(both, found, dpo, strict=True):
        assert row["ref_chosen_logps"] == single["ref_completion_logps"] == pytest.approx(pair["ref_chosen_logps"])
        assert row["ref_rejected_logps"] == pytest.approx(pair["ref_rejected_logps"])
        assert row["ref_chosen_kl_logps"] != row["ref_chosen_logps"]


def test_columns_that_are_there_already_give_way_and_it_is_said(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "ref_chosen_logps": -1.0} for row in lines(world / "pairs.jsonl")]
    (tmp_path / "old.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main(["reference", "export", "dpo", *of(world, "--data", str(tmp_path / "old.jsonl"))]) == 0
    said = capsys.readouterr()
    assert "the data's own ref_chosen_logps gave way" in said.err
    assert json.loads(said.out.splitlines()[0])["ref_chosen_logps"] != -1.0


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        (["export"], "for which method? Expected one of apo_zero"),
        (["export", "dop"], "Did you mean dpo?"),
        (["export", "orpo", "--data", "x.jsonl"], "orpo: has no reference"),
        (["export", "distill", "--ref", "x"], "no column of the data"),
        (["export", "dpo", "--data", "-"], "the rows are read twice"),
        (["export", "dpo", "--data", "x.jsonl", "--json"], "without -o FILE stdout is the rows"),
        (["export", "dpo", "--tokns"], "Did you mean --tokens?"),
        (["export", "dpo", "-o", "out.csv"], "Expected FILE.jsonl or FILE.parquet"),
        (["export", "dpo", "--ref-columns", "--data", "x.jsonl"], "the data brings its reference"),
        (["import"], "lite reference import: what?"),
        (["import", "gone.sqlite"], "gone.sqlite: there is no such file"),
        (["import", "gone.sqlite", "two.sqlite"], "two.sqlite: there is no such file"),
    ],
)
def test_what_cannot_be_done(
    typed: list[str], problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LITE_CACHE", str(tmp_path / "cache"))
    assert main(["reference", *typed]) == 2
    said = capsys.readouterr()
    assert problem in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_a_cache_from_elsewhere_is_taken_in_and_used(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Filled there, imported here: nothing is computed, and the bytes are the same."""
    there, here = tmp_path / "there", tmp_path / "here"
    result(["precompute", "dpo", *of(world, "--cache", str(there))], capsys)
    shutil.copy(there / "reference.sqlite", tmp_path / "carried.sqlite")
    take = ["reference", "import", str(tmp_path / "carried.sqlite"), "--cache", str(here)]
    found = result(take, capsys)
    assert found["cache"] == str(here / "reference.sqlite")
    assert [(one["rows"], one["new"], one["broken"]) for one in found["files"]] == [(40, 40, 0)]
    assert rows_of(here) == rows_of(there)
    used = result(["precompute", "dpo", *of(world, "--cache", str(here))], capsys)
    assert (used["computed"], used["reused"]) == (0, 20)
    assert main(take) == 0
    assert "0 of 40 rows are new here" in capsys.readouterr().out


def rows_of(cache: Path) -> list[tuple]:
    with sqlite3.connect(cache / "reference.sqlite") as connection:
        return connection.execute("SELECT * FROM logps ORDER BY identity, key").fetchall()


def test_ctrl_c_in_an_import_keeps_what_was_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some thousand rows, in transactions of one thousand."""
    identity = Identity("00" * 16, "nf4", "bfloat16", model="qwen-14b")
    with Store.open(tmp_path / "there") as store:
        store.put(identity, [Row(completion_key([n], [n]), torch.full((400,), -0.5)) for n in range(40000)])
    take = ["reference", "import", str(tmp_path / "there"), "--cache", str(tmp_path / "here"), "--json"]
    code = "import sys; from lite.cli import main; sys.exit(main())"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, *take], **streams) as process:
        for line in process.stderr:
            if "/40000 rows" in line:
                process.send_signal(signal.SIGINT)
                break
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert said.splitlines()[-1] == "stopped. What was read is kept; the same command takes in the rest."
    (found,) = result(take[:-1], capsys)["files"]
    assert found["rows"] == 40000
    assert 0 < found["new"] < 40000
    assert rows_of(tmp_path / "here") == rows_of(tmp_path / "there")


def test_a_data_file_is_no_cache(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    take = ["reference", "import", str(world / "pairs.jsonl"), "--cache", str(tmp_path / "cache")]
    assert main(take) == 2
    assert "`--ref-columns` takes them as they are" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reference", "export", "kto", "--help"]) == 0
    page = capsys.readouterr().out
    for flag in ("  -o FILE", "--[no-]tokens", "--[no-]compute", "--desirable-weight", "--ref TEXT"):
        assert flag in page
    assert main(["reference", "import", "--help"]) == 0
    assert "Usage: lite reference import FILE …" in capsys.readouterr().out
