"""Journeys at the prompt: what is typed, what is seen, and the exit status."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lite import __version__
from lite.cli import main
from lite.cli.command_line import OTHERS

OWN_LOSS = '''
from lite.loss.registry import loss

@loss(learning_rate=3e-6)
def margin(chosen, rejected, *, steepness: float = 0.5):
    """A margin of my own.

    steepness: how hard it pulls.
    """
'''


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said, on stderr alone, to a command line that cannot be followed."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[-1] != ""
    assert "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_overview_has_a_line_for_each_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    page = capsys.readouterr().out
    for word in ("orpo", "sft", "simpo", "cpo", *OTHERS, "FILE.py:FUNCTION", "Start here", "--4bit"):
        assert word in page


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lite {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["orpo", "--help"],
        ["resume", "--help"],
        ["score", "--help"],
        ["what-if", "--help"],
        ["orpo", "--lora-r", "0"],
    ],
)
def test_help_and_refusals_import_no_torch(arguments: list[str]) -> None:
    """The tenths of a second that help takes are Python, pydantic and rich; torch would take seconds."""
    code = (
        f"import sys; from lite.cli import main; main({arguments!r}); "
        "heavy = {'torch', 'transformers', 'numpy', 'peft', 'pyarrow'} & sys.modules.keys(); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_installed_command_tells_its_status() -> None:
    """Through the entry point of the package, as a shell sees it."""
    code = "import sys; from importlib.metadata import entry_points as e; sys.argv[0] = 'lite'; "
    code += "sys.exit(e(group='console_scripts', name='lite')['lite'].load()())"
    for arguments, status in ((["--version"], 0), (["orop"], 2)):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr


def test_a_misspelt_verb(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["opro"], capsys)
    assert message.startswith("error: opro: no such verb. Did you mean orpo?\n")
    assert "orpo, sft, simpo, cpo, " in message
    assert ", resume, " in message


def test_an_option_before_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert "options come after the verb, as in `lite orpo --4bit`" in refused(["--4bit", "orpo"], capsys)


def test_misspelt_options_are_told_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["orpo", "--lerning-rate", "1", "--lora-rank=3", "--seed", "1"], capsys)
    assert "--lerning-rate: no such option. Did you mean --learning-rate?" in message
    assert "--lora-rank: no such option. lite calls it --lora-r." in message
    assert "--seed" not in message
    assert message.endswith("All options: lite orpo --help\n")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["orpo", "--data"], "--data"),
        (["orpo", "pairs.jsonl"], "pairs.jsonl"),
        (["resume"], "RUN"),
        (["resume", "runs/x", "--max-steps", "0"], "--max-steps = 0: expected a whole number, at least 1."),
        (["resume", "runs/x", "--max-stps", "9"], "Did you mean --max-steps?"),
        (["own.py:margin"], "there is no file own.py"),
    ],
)
def test_a_command_line_that_cannot_be_followed(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert problem in refused(arguments, capsys)


def test_wrong_values_are_named_by_their_flags_all_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    line = "orpo --lora-r 0 --max-steps 1.5 --dtype fp16 --beta big --columns prompt --4bit --8bit --learning-rate nan"
    message = refused(line.split(), capsys)
    for problem in (
        "--lora-r = 0: expected a whole number, at least 1.",
        "--max-steps = '1.5': expected a whole number, at least 1.",
        "--dtype = 'fp16': expected one of auto, bfloat16, float32.",
        "--beta = 'big': expected a number, at least 0.",
        "--columns = 'prompt': expected pairs",
        "--4bit = True beside load_in_8bit",
        "--learning-rate = nan: expected a number, above 0.",
    ):
        assert problem in message


def test_full_training_beside_what_only_an_adapter_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named as the user named it: by the shorthand, the flag, and the file's line."""
    file = tmp_path / "r.yaml"
    file.write_text("load_in_4bit: true\n", encoding="utf-8")
    message = refused(["orpo", "--recipe", str(file), "--galore", "--lora-r", "8"], capsys)
    assert f"{file}: load_in_4bit = True beside galore: quantised weights cannot be trained." in message
    assert "--lora-r = 8 beside galore: there is no adapter." in message
    message = refused(["orpo", "--use-galore", "--train-type=full"], capsys)
    assert "--use-galore: no such option. lite calls it --galore." in message
    assert "--train-type: no such option. Instead: an adapter is trained; with --full, or --galore" in message


def test_wrong_values_of_a_file_are_named_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("lora_rank: 8\nseed: -1\nlora_r: 0\n", encoding="utf-8")
    message = refused(["orpo", "--recipe", str(file), "--seed", "-2"], capsys)
    assert f"{file}: lora_rank: no such setting of orpo. lite calls it lora_r" in message
    assert f"{file}: lora_r = 0: expected" in message
    assert "--seed = -2: expected a whole number, at least 0, below 4294967296." in message


def test_a_recipe_of_another_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("method: simpo\n", encoding="utf-8")
    message = refused(["orpo", "--recipe", str(file)], capsys)
    assert "method = simpo, but the verb is orpo" in message
    assert f"lite simpo --recipe {file}" in message


def test_a_fault_of_lite_is_told_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    """No input reaches one on purpose, so the caller errs: an argument that is no text."""
    assert main([7]) == 1
    said = capsys.readouterr().err
    assert "TypeError" in said
    assert "This is a fault of lite" in said


def test_ctrl_c_before_a_run_is_130(tmp_path: Path) -> None:
    """It waits for a recipe that nobody writes."""
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)
    code = f"import sys; from lite.cli import main; sys.exit(main(['orpo', '--recipe', {str(pipe)!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    with process, pipe.open("w"):  # opens once it reads
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "stopped\n"


def test_a_loss_of_the_users_own_is_a_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN_LOSS, encoding="utf-8")
    assert main([f"{file}:margin", "--help"]) == 0
    page = capsys.readouterr().out
    assert "A margin of my own." in page
    assert "--steepness NUMBER" in page
    assert "How hard it pulls. [default: 0.5]" in page
    assert "default: 3e-06" in page
    assert "Did you mean margin?" in refused([f"{file}:margn"], capsys)
