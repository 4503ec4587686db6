"""The exact commands of other engines."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lite.errors import ExportError
from lite.merge.source import source_of
from lite.model.catalog import BUNDLED_MODEL
from lite.serve.engines import Way, program, run, ways
from lite.serve.exported import folder_of
from lite.serve.serve import Door
from tests import served


def test_a_whole_model_is_served_as_it_is() -> None:
    source = source_of(BUNDLED_MODEL)
    (way,) = ways("vllm", source, Door(port=9000), 2048, name="mine")
    assert way.merged is None
    assert " ".join(way.command) == (
        f"vllm serve {source.folder} --served-model-name mine --host 127.0.0.1 --port 9000 --max-model-len 2048"
    )
    (way,) = ways("vllm", source, Door(api_key="sesame"), None, name="mine")
    assert "sesame" not in way.command  # which everyone on this machine can read
    assert way.environment == {"VLLM_API_KEY": "sesame"}
    (way,) = ways("sglang", source, Door(api_key="sesame"), None, name="mine")
    assert " ".join(way.command) == (
        f"python -m sglang.launch_server --model-path {source.folder} --served-model-name mine --host 127.0.0.1 "
        "--port 8080 --api-key sesame"
    )


def test_an_adapter_is_merged_or_put_on_its_base() -> None:
    source = source_of(served.adapter())
    merged, beside = ways("vllm", source, Door(), None, name="tuned")
    assert merged.merged is not None
    assert merged.merged.parent == folder_of(source)  # not the adapter's own, which may not be written to
    assert served.adapter() not in merged.merged.parents
    assert merged.command[2] == str(merged.merged)
    assert beside.merged is None
    assert " ".join(beside.command) == (
        f"vllm serve {BUNDLED_MODEL} --enable-lora --max-lora-rank 8 --lora-modules tuned={served.adapter()} "
        f"--tokenizer {source.files} --host 127.0.0.1 --port 8080"
    )
    assert len(ways("sglang", source, Door(), None, name="tuned")) == 1


def test_a_folder_that_is_merged_already_is_not_merged_again() -> None:
    source = source_of(served.adapter())
    made = ways("vllm", source, Door(), None, name="tuned")[0].merged
    assert isinstance(made, Path)
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    try:
        assert ways("vllm", source, Door(), None, name="tuned")[0].merged is None
    finally:
        (made / "config.json").unlink()
        made.rmdir()


ENGINE = """#!/bin/sh
trap 'sleep 0.5; echo "stopped at leisure"; exit 3' INT TERM
echo "$$ $* $VLLM_API_KEY"
while :; do sleep 0.05; done
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no program becomes another")
@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_the_engines_own(asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that was `lite serve` is the engine, which ends when it is asked to, and takes its time."""
    way = Way("", ["vllm", "serve", "model"], None, {"VLLM_API_KEY": "sesame"})
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # an environment without a vllm of its own
    with pytest.raises(ExportError, match=r"no program vllm in .*`pip install vllm`"):
        program("vllm", way)
    script = tmp_path / "vllm"
    script.write_text(ENGINE)
    script.chmod(0o755)
    found = program("vllm", way)
    assert found == str(script)
    # `run` in the child, before the child would become the program named here.
    child = subprocess.Popen(["false"], preexec_fn=lambda: run(found, way), stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == f"{child.pid} serve model sesame\n"
    child.send_signal(asked)
    assert child.communicate(timeout=30)[0] == "stopped at leisure\n"
    assert child.returncode == 3
