"""`lite merge`, typed: the bundled model trained for two steps, merged, loaded, scored; and all that is refused.

The bundled model is stored in bf16; here in fp32, so that nothing is rounded where base and adapter are added.
"""

import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lite.cli import main
from lite.cli.training import BUNDLED_RECIPE
from tests.tiny import write_model

MODEL = BUNDLED_RECIPE.parent / "model"
pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="the bundled model has not been made")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four bundled pairs, the model, and the folders of what is made of them."""
    folder = tmp_path_factory.mktemp("merge")
    rows = (BUNDLED_RECIPE.parent / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "pairs.jsonl").write_text("\n".join(rows[:4]), encoding="utf-8")
    shutil.copytree(MODEL, folder / "model")
    AutoModelForCausalLM.from_pretrained(str(MODEL), dtype=torch.float32).save_pretrained(str(folder / "model"))
    return folder


def trained(folder: Path, name: str, *more: str) -> Path:
    """The folder of a run of two steps on these pairs, held out as well."""
    data = ["--data", str(folder / "pairs.jsonl"), "--eval-data", str(folder / "pairs.jsonl"), "--dtype", "float32"]
    few = ["--max-steps", "2", "--batch-size", "4", "--samples", "0", "--lora-r", "4", "--learning-rate", "1e-3"]
    assert main(["orpo", "--model", str(folder / "model"), *data, *few, *more, "--output-dir", str(folder / name)]) == 0
    return folder / name


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return trained(folder, "run")


@pytest.fixture(scope="module")
def run_4bit(folder: Path) -> Path:
    return trained(folder, "run-4bit", "--4bit")


def test_a_run_becomes_a_model_like_any_other(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers computes what base and adapter do; `lite score` says the same of it as of the run."""
    to = tmp_path / "merged"
    capsys.readouterr()
    assert main(["merge", str(run), "-o", str(to)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"merged    {to}: ")
    for words in (f"lite chat {to}", f"lite export {to} --to gguf", f"vllm serve {to}", "float32"):
        assert words in said.out
    assert f"merging into {to} …" in said.err

    tokenizer = AutoTokenizer.from_pretrained(str(to))
    turn = [{"role": "user", "content": "What is the capital?"}]
    ids = tokenizer(
        tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True), return_tensors="pt"
    ).input_ids
    base = AutoModelForCausalLM.from_pretrained(str(run.parent / "model"), dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(str(to), dtype=torch.float32)
    with torch.no_grad():
        before, found = base(ids).logits, merged(ids).logits
        expected = PeftModel.from_pretrained(base, str(run / "adapter"))(ids).logits
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - before).abs().max() > 1e-3

    figures = []
    rows = ["--data", str(run.parent / "pairs.jsonl"), "--dtype", "float32", "--json"]
    for model in (["--run", str(run)], ["--model", str(to)]):
        assert main(["score", *model, *rows]) == 0
        figures.append(json.loads(capsys.readouterr().out.splitlines()[-1])["summary"])
    for key in ("mean_margin", "perplexity_chosen", "perplexity_rejected"):
        assert figures[1][key] == pytest.approx(figures[0][key], rel=1e-4)


def test_in_four_bits_the_better_base_is_found(
    run_4bit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["merge", str(run_4bit), "-o", str(tmp_path / "merged"), "--onto", "auto", "--json"]) == 0
    said = capsys.readouterr()
    done = json.loads(said.out)
    assert [one["weights"] for one in done["compared"]] == ["as trained", "original", "quantised"]
    live, original, quantised = (one["chosen_logp"] for one in done["compared"])
    assert quantised == pytest.approx(live, abs=1e-5)
    assert done["onto"] == ("quantised" if quantised > original else "original")
    lines = said.err.splitlines()
    head = next(i for i, line in enumerate(lines) if "log p of chosen, a token" in line)
    assert [line.split()[-1] for line in lines[head + 1 : head + 4]] == [
        f"{one['margin']:.3f}" for one in done["compared"]
    ]
    assert f"merged onto the {done['onto']} weights, under which log p of chosen is higher" in said.err
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert main(["merge", str(run_4bit), "-o", str(tmp_path / "other"), "--onto", "quantised"]) == 0
    assert "onto the quantised weights" in capsys.readouterr().out


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file may be larger than half of the weights."""
    half = (run.parent / "model" / "model.safetensors").stat().st_size // 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, limits[1]))
    try:
        refused([str(run), "-o", str(tmp_path / "merged")], "File too large", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_being_terminated_leaves_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As by a system that shuts down, in the midst of the writing; afterwards SIGTERM is again what it was."""

    def terminate() -> None:
        while not any(tmp_path.glob(".merged.unfinished-*")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    too_late: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: too_late.append(number))
    try:
        threading.Thread(target=terminate, daemon=True).start()
        assert main(["merge", str(run), "-o", str(tmp_path / "merged")]) == 130
        assert signal.getsignal(signal.SIGTERM) is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not too_late
    assert "stopped" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def refused(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["merge", *arguments]) == 2
    said = capsys.readouterr()
    assert problem in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_what_is_refused(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with exit status 2, and nothing under the name."""
    to = tmp_path / "merged"
    refused([str(run)], f"lite merge: where to? Expected `lite merge {run} -o DIR`", capsys)
    refused([str(run), "-o", str(folder)], "something is in it already", capsys)
    refused([str(run), "-o", str(to), "--onto", "both"], "--onto both: expected one of", capsys)
    refused([str(run), "-o", str(to), "--onto", "quantised"], "not trained on a base in 4 or 8 bits", capsys)
    refused([str(tmp_path / "none"), "-o", str(to)], "is not there", capsys)
    refused([str(run), "-o", str(to), "--outo", "x"], "--outo: no such option. Did you mean --onto?", capsys)

    for name, content in (("chat_template.jinja", "{{ messages }}"), ("tokenizer.json", '{"model": {}}')):
        changed = shutil.copytree(run, tmp_path / f"changed-{name}")
        (changed / "adapter" / name).write_text(content, encoding="utf-8")
        refused([str(changed), "-o", str(to)], f"({name}", capsys)
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    refused([str(unfinished), "-o", str(to)], f"`lite resume {unfinished}`", capsys)
    assert not to.exists()


def test_another_base(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of another shape, when nothing is known of files: every tensor that does not fit is named."""
    write_model(tmp_path / "base")
    refused(
        [str(run), "-o", str(tmp_path / "merged"), "--base", str(tmp_path / "base")], "trained on another base", capsys
    )
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    refused([str(adapter), "-o", str(tmp_path / "merged"), "--base", str(tmp_path / "base")], "another base", capsys)
    assert not (tmp_path / "merged").exists()


def test_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--help"]) == 0
    page = capsys.readouterr().out
    for words in ("lite merge RUN -o DIR", "--onto original|quantised|auto", "--base DIR", "default: auto"):
        assert words in page
