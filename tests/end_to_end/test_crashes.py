"""A run that was killed, whenever, and resumed, leaves the weights, metrics and samples of one that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_settings

pytestmark = pytest.mark.slow


def tried(settings: dict[str, object], folder: Path) -> dict[str, dict]:
    """All ways to die, tried in one process: it takes seconds to import what a run needs.

    Lines, evaluations, refreshes of the reference and checkpoints fall on different steps.
    """
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


def settings_of(tiny: Path, folder: Path, **changes: object) -> dict[str, object]:
    """Twelve steps of a loss with a trained number and a reference that is refreshed."""
    twelve_steps = {"num_train_epochs": 2.4, "logging_steps": 2, "eval_steps": 5}
    compared = {"method": "gamma_dpo", "refresh_reference": 4, "cache": str(folder / "cache")}
    return tiny_settings(tiny, **twelve_steps, **compared, **changes)


@pytest.fixture(scope="module")
def outcomes(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Of an adapter, whose dropout draws random numbers in every step."""
    folder = tmp_path_factory.mktemp("crashes")
    return tried(settings_of(tiny, folder, lora_dropout=0.1), folder)


@pytest.fixture(scope="module")
def of_whole_weights(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Of weights in eight bits, beside which updates wait; rounding draws random numbers."""
    folder = tmp_path_factory.mktemp("crashes-of-whole-weights")
    galore = {"galore": True, "galore_rank": 8, "galore_update_interval": 5, "int8_weights": True}
    settings = settings_of(tiny, folder, **galore, galore_merge="refresh", galore_states="bfloat16")
    del settings["lora_r"]
    return tried(settings, folder)


def test_every_death_leaves_what_no_death_leaves(outcomes: dict[str, dict]) -> None:
    assert {name: found for name, found in outcomes.items() if found["resumed"] != 0 or found["different"]} == {}


def test_they_did_die(outcomes: dict[str, dict]) -> None:
    """At chosen moments, and at random ones, of which LITE_RANDOM_DEATHS says how many."""
    killed = [found for found in outcomes.values() if found["ended"] == -9]
    assert len(killed) >= max(6, len(outcomes) - 5)
    assert any(not found["had"] for found in killed)
    assert any("checkpoint-3" in found["had"] for found in killed)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("death", "had"),
    [
        ("in half an update", ["checkpoint-3", "checkpoint-6"]),
        ("in half a model", ["checkpoint-12", "checkpoint-9"]),
    ],
)
def test_of_whole_weights_too(of_whole_weights: dict[str, dict], death: str, had: list[str]) -> None:
    """Killed where it was meant to be, and resumed to what no death leaves."""
    found = of_whole_weights[death]
    assert (found["ended"], found["finished"], found["had"]) == (-9, False, had)
    assert (found["resumed"], found["different"]) == (0, [])
    assert found["left"] == ["checkpoint-12", "checkpoint-9"]


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
