"""From the command line: Ctrl-C leaves a checkpoint and a command, and the command finishes the run."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.tiny import tiny_settings

pytestmark = pytest.mark.slow


def lite(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", "import sys; from lite.cli import main; sys.exit(main())", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_ctrl_c_and_the_command_that_it_leaves(tiny: Path, tmp_path: Path) -> None:
    folder, file = tmp_path / "run", tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tiny_settings(tiny, max_steps=60, save_steps=1000)), encoding="utf-8")
    started = lite("orpo", "--recipe", str(file), "--output-dir", str(folder), "--json")
    while not (folder / "speed.jsonl").exists():
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    out, told = started.communicate(timeout=60)
    assert (started.returncode, out) == (130, "")
    assert "Traceback" not in told
    command = shlex.split(told.strip().splitlines()[-1].partition("To go on: ")[2])
    assert command == ["lite", "resume", str(folder)]
    [checkpoint] = (folder / "checkpoints").iterdir()
    stopped_after = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 1 <= stopped_after < 60

    resumed = lite(*command[1:], "--json")
    out, told = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, told
    result = json.loads(out.splitlines()[-1])
    assert result["steps"] == 60
    assert result["run"] == str(folder)
    assert f"step {stopped_after + 1} to 60" in told
    assert result["eval_before"]["eval_loss"] > result["eval_after"]["eval_loss"]

    again = lite("orpo", "--recipe", str(file), "--output-dir", str(folder))
    _, told = again.communicate(timeout=60)
    assert again.returncode == 2
    assert f"lite resume {folder}" in told
    assert "Traceback" not in told
