"""A run that was killed, whenever, and resumed, leaves the weights, metrics and samples of one that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["adapter", "galore"])
def outcomes(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """All ways to die, tried in one process: it takes seconds to import what a run needs.

    All that a run has to remember is in it: dropout draws random numbers in every step, the loss has a trained number
    and a reference that is refreshed; lines, evaluations, refreshes and checkpoints fall on different steps. Of whole
    weights, updates wait beside them, and rounding draws random numbers.
    """
    folder = tmp_path_factory.mktemp("crashes")
    twelve_steps = {"num_train_epochs": 2.4, "logging_steps": 2, "eval_steps": 5}
    compared = {"method": "gamma_dpo", "refresh_reference": 4, "cache": str(folder / "cache")}
    settings = tiny_settings(tiny, **twelve_steps, **compared)
    if request.param == "adapter":
        settings["lora_dropout"] = 0.1
    else:
        del settings["lora_r"]
        settings |= {"galore": True, "galore_rank": 8, "galore_update_interval": 5, "int8_weights": True}
        settings |= {"galore_merge": "refresh", "galore_states": "bfloat16"}
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    program = Path(__file__).with_name("crashes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(program), str(folder), str(folder / "settings.json")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_death_leaves_what_no_death_leaves(outcomes: dict[str, dict]) -> None:
    assert {name: found for name, found in outcomes.items() if found["resumed"] != 0 or found["different"]} == {}


def test_they_did_die(outcomes: dict[str, dict]) -> None:
    """At ten moments or more, some before the first checkpoint and some after it."""
    killed = [found for found in outcomes.values() if found["ended"] == -9]
    assert len(killed) >= 10
    assert any(not found["had"] for found in killed)
    assert any("checkpoint-3" in found["had"] for found in killed)
    assert outcomes.get("in half a model", killed[0])["ended"] == -9


@pytest.mark.parametrize(
    ("death", "had"),
    [
        ("in half a file", [".unfinished-checkpoint-6", "checkpoint-3"]),
        ("between syncs", [".unfinished-checkpoint-6", "checkpoint-3"]),
        ("before the rename", [".unfinished-checkpoint-6", "checkpoint-3"]),
        ("after the rename", ["checkpoint-3", "checkpoint-6"]),
        ("in the pruning", [".unfinished-checkpoint-3", "checkpoint-6", "checkpoint-9"]),
    ],
)
def test_in_a_checkpoint(outcomes: dict[str, dict], death: str, had: list[str]) -> None:
    assert outcomes[death]["ended"] == -9
    assert outcomes[death]["had"] == had
    assert outcomes[death]["left"] == ["checkpoint-12", "checkpoint-9"]


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_asked_to_stop_it_leaves_a_checkpoint(outcomes: dict[str, dict], number: str) -> None:
    assert outcomes[number]["ended"] == 7
    assert not outcomes[number]["finished"]
    assert outcomes[number]["had"]
