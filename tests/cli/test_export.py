"""`lite export`, typed: a run of the bundled model as two GGUF files in one reading, proved; and all that is refused.

The types of the tensors are named, so that no fallback to another type goes by unseen.
"""

import json
import resource
import shutil
import sys
from pathlib import Path

import gguf
import pytest
from safetensors.torch import load_file, save_file

from lite.cli import main
from lite.cli.training import BUNDLED_RECIPE
from tests.tiny import write_model

MODEL = BUNDLED_RECIPE.parent / "model"
pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="the bundled model has not been made")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, trained for a few steps that change what it says."""
    folder = tmp_path_factory.mktemp("export") / "run"
    few = ["--max-steps", "8", "--samples", "0", "--output-dir", str(folder)]
    assert main(["orpo", *few]) == 0
    return folder


def test_a_run_becomes_files_that_llama_cpp_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both types from one reading, in the run's folder; what is said of them, on stdout and in the report."""
    capsys.readouterr()
    assert main(["export", str(run), "--type", "Q4_K_M,q8_0"]) == 0
    said = capsys.readouterr()
    files = {kind: run / "export" / f"run-{kind}.gguf" for kind in ("q4_k_m", "q8_0")}
    for words in (*map(str, files.values()), f"lite chat {files['q4_k_m']}", f"lite serve {files['q4_k_m']}"):
        assert words in said.out
    assert sorted(path.name for path in (run / "export").iterdir()) == [
        "export_report.json", "run-q4_k_m.gguf", "run-q8_0.gguf",
    ]  # fmt: skip

    report = json.loads((run / "export" / "export_report.json").read_text(encoding="utf-8"))
    assert report["run-q8_0.gguf"]["types"] == {"F32": 17, "Q8_0": 29}
    # Of four layers, attn_v and ffn_down of the last and of those that llama-quantize gives more bits; and the head.
    assert report["run-q4_k_m.gguf"]["types"] == {"F32": 17, "Q4_K": 24, "Q6_K": 5}
    for kind, least in (("q4_k_m", 0.90), ("q8_0", 0.99)):
        found = report[f"run-{kind}.gguf"]
        assert found["problems"] == []
        assert found["proof"]["prompts"] == "held-out rows of bundled"
        assert found["proof"]["agreement_exact"] >= least
        assert found["proof"]["ended"] == found["proof"]["answers"] > 0
        assert found["bytes"] == files[kind].stat().st_size

    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(files["q4_k_m"]).tensors}
    assert kinds["token_embd.weight"] == "Q6_K"
    assert kinds["blk.0.attn_q.weight"] == "Q4_K"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_a_second_export_keeps_the_first_and_its_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (run / "export" / "run-q8_0.gguf").exists():
        assert main(["export", str(run), "--type", "q8_0", "--no-check"]) == 0
    before = (run / "export" / "run-q8_0.gguf").read_bytes()
    capsys.readouterr()
    assert main(["export", str(run), "--type", "q8_0", "--no-check"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["export", str(run), "--type", "f16", "--no-check"]) == 0
    assert (run / "export" / "run-q8_0.gguf").read_bytes() == before
    report = json.loads((run / "export" / "export_report.json").read_text(encoding="utf-8"))
    assert {"run-q8_0.gguf", "run-f16.gguf"} <= report.keys()
    assert "proof" not in report["run-f16.gguf"]


def test_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    for threads in ("1", "3"):
        to = tmp_path / f"{threads}.gguf"
        assert main(["export", str(MODEL), "--type", "q4_k_m", "--threads", threads, "--no-check", "-o", str(to)]) == 0
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_an_importance_matrix_of_the_rows_changes_the_blocks_and_no_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["--data", str(BUNDLED_RECIPE.parent / "held_out.jsonl")]
    files = []
    for name, more in (("plain", []), ("weighed", ["--imatrix", "data", *rows])):
        files.append(tmp_path / f"{name}.gguf")
        arguments = [str(MODEL), "--type", "q4_k_m", "--no-check", "-o", str(files[-1]), *more]
        assert main(["export", *arguments]) == 0
    plain, weighed = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in files)
    assert {n: t.tensor_type for n, t in plain.items()} == {n: t.tensor_type for n, t in weighed.items()}
    changed = {name for name in plain if (plain[name].data != weighed[name].data).any()}
    assert "blk.2.ffn_up.weight" in changed
    assert "blk.0.attn_norm.weight" not in changed
    capsys.readouterr()
    assert main(["export", str(MODEL), "--imatrix", "data", "-o", str(tmp_path / "x.gguf")]) == 2
    assert "--data FILE" in capsys.readouterr().err


def test_what_is_asked_for_in_vain_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, report = tmp_path / "there.gguf", tmp_path / "taken" / "export_report.json"
    there.write_text("mine")
    report.parent.mkdir()
    report.write_text("[]")
    for arguments, words in (
        (["--type", "q4_k_x"], "Did you mean q4_k_"),
        (["--to", "ggfu"], "Did you mean gguf?"),
        (["-o", str(there)], "is there already"),
        (["-o", str(report.parent)], "is a folder; a file is written here"),
        (["-o", str(report.with_name("new.gguf"))], "is no report of lite's"),
        (["--onto", "quantised"], "there is nothing to merge"),
        (["--onto", "best"], "expected one of original, quantised, auto"),
        (["--type", "q2_k_s"], "needs an importance matrix"),
        (["--threads", "0"], "at least 1"),
        (["--to", "adapter"], "no adapter"),
        (["--imatrix", str(there)], "no importance matrix can be read from it"),
        (["--data", str(tmp_path / "typo.jsonl")], "typo.jsonl"),
        (["--to", "ollama", "--type", "q8_0,q4_0"], "an Ollama model has one type"),
    ):
        capsys.readouterr()
        to = [] if "-o" in arguments else ["-o", str(tmp_path / "new.gguf")]
        assert main(["export", str(MODEL), *arguments, *to]) == 2, arguments
        said = capsys.readouterr().err
        assert words in said, said
        assert "Traceback" not in said
        assert "MiB" not in said  # of what is written
    assert main(["export", str(tmp_path / "none"), "-o", str(tmp_path / "new.gguf")]) == 2
    assert "is not there. Expected a folder" in capsys.readouterr().err
    assert there.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "there.gguf"]


def test_a_folder_is_replaced_only_if_lite_exported_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not what the user keeps there, nor where the command is typed, nor the model itself."""
    precious, mine = tmp_path / "precious", tmp_path / "model"
    precious.mkdir()
    (precious / "diary.txt").write_text("mine")
    shutil.copytree(MODEL, mine)
    folder = ["export", str(mine), "--to", "safetensors", "--no-check", "-o"]
    for to, words in ((precious, "lite did not export"), (mine, "is needed"), (tmp_path, "is needed")):
        capsys.readouterr()
        assert main([*folder, str(to), "--overwrite"]) == 2
        assert words in capsys.readouterr().err
    assert (precious / "diary.txt").read_text() == "mine"
    assert (mine / "model.safetensors").exists()
    for more, status in (([], 0), ([], 2), (["--overwrite"], 0)):
        assert main([*folder, str(tmp_path / "new"), *more]) == status
    assert json.loads((tmp_path / "new" / "export_report.json").read_text(encoding="utf-8")).keys() == {"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new", "precious"]


def test_a_broken_model_leaves_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard cut short, a tensor missing, an architecture that nobody knows, a run on another base."""
    for name, words in (
        ("cut", "model.safetensors"),
        ("lacking", "model.layers.2.mlp.up_proj.weight"),
        ("strange", "Qwen3ForCausalLM"),
    ):
        model = tmp_path / name
        shutil.copytree(MODEL, model)
        if name == "cut":
            with (model / "model.safetensors").open("r+b") as file:
                file.truncate(100_000)
        elif name == "lacking":
            tensors = load_file(model / "model.safetensors")
            del tensors[words]
            save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        else:
            config = json.loads((model / "config.json").read_text(encoding="utf-8"))
            (model / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3VeryNewForCausalLM"]}))
        capsys.readouterr()
        assert main(["export", str(model), "-o", str(tmp_path / f"{name}.gguf")]) == 2
        assert words in capsys.readouterr().err
    write_model(tmp_path / "other")
    capsys.readouterr()
    assert main(["export", str(run), "--base", str(tmp_path / "other"), "-o", str(tmp_path / "x.gguf")]) == 2
    assert "another" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "lacking", "other", "strange"]


def test_help_has_a_line_for_each_target_and_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for name in ("gguf", "gguf-adapter", "ollama", "awq", "q4_k_m", "iq4_xs", "bf16"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 1, name


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of a process there")
def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files stands for the disk: a write beyond it fails as one to a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        status = main(["export", str(MODEL), "--type", "q8_0", "-o", str(tmp_path / "model.gguf")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    said = capsys.readouterr().err
    assert "has no room for model.gguf" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
