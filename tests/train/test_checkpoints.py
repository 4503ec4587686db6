"""Checkpoints are whole or not there; what a disk breaks afterwards is seen and passed over."""

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lite.errors import RunError
from lite.train import checkpoints


def fill(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 1000)
    (folder / "inner").mkdir()
    (folder / "inner" / "state").write_bytes(b"s")


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for step in (9, 10, 100):
        checkpoints.write(tmp_path, step, fill)
    return tmp_path


def test_newest_is_by_step_not_by_name(three: Path) -> None:
    assert checkpoints.newest(three, pytest.fail) == three / "checkpoint-100"
    assert [checkpoints.step_of(folder) for folder in checkpoints.listed(three)] == [9, 10, 100]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: os.truncate(folder / "weights", 999), "weights has 999 bytes instead of 1,000"),
        (lambda folder: (folder / "weights").write_bytes(b"w" * 999 + b"x"), "weights has other content"),
        (lambda folder: (folder / "inner" / "state").unlink(), "inner/state is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest.json"),
        (lambda folder: os.truncate(folder / "manifest.json", 20), "no readable manifest.json"),
    ],
    ids=["cut short", "one bit", "missing", "no manifest", "half a manifest"],
)
def test_a_broken_one_is_passed_over_with_a_word(three: Path, harm, said: str) -> None:
    harm(three / "checkpoint-100")
    words: list[str] = []
    assert checkpoints.newest(three, words.append) == three / "checkpoint-10"
    assert len(words) == 1
    assert "checkpoint-100" in words[0]
    assert said in words[0]


def test_none_is_whole(three: Path) -> None:
    for folder in checkpoints.listed(three):
        (folder / "weights").unlink()
    words: list[str] = []
    assert checkpoints.newest(three, words.append) is None
    assert len(words) == 3


@pytest.fixture
def no_room(tmp_path: Path) -> Iterator[None]:
    """No file may have more than 100 KB: to a program that is a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"w" * 200_000),
        lambda path: torch.save(torch.ones(50_000), str(path)),
        lambda path: save_file({"ones": torch.ones(50_000)}, path),
    ],
    ids=["python", "torch", "safetensors"],
)
def test_a_full_disk_leaves_the_others(three: Path, write: Callable) -> None:
    """Each library that writes into a checkpoint has an error of its own for it."""
    with pytest.raises(RunError, match=r"checkpoint-101: the checkpoint could not be written.*\n.*`lite resume "):
        checkpoints.write(three, 101, lambda folder: write(folder / "weights"))
    assert sorted(path.name for path in three.iterdir()) == ["checkpoint-10", "checkpoint-100", "checkpoint-9"]
    assert checkpoints.newest(three, pytest.fail) == three / "checkpoint-100"


def test_every_file_is_synced_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that makes a crash harmless: content, then the folder, then the rename, then the parent."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def watched_replace(old: Path, new: Path) -> None:
        events.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    checkpoints.write(tmp_path, 1, fill)
    assert set(events[:4]) == {"inner", "state", "manifest.json", "weights"}
    assert events[4:] == [".unfinished-checkpoint-1", "rename", tmp_path.name]


def test_prune_keeps_the_newest_and_clears_what_a_kill_left(three: Path) -> None:
    (three / ".unfinished-checkpoint-100").mkdir()
    (three / ".unfinished-checkpoint-9").mkdir()
    (three / ".unfinished-checkpoint-9" / "weights").write_bytes(b"w")
    checkpoints.prune(three, keep=2)
    assert sorted(path.name for path in three.iterdir()) == ["checkpoint-10", "checkpoint-100"]


def test_a_broken_later_one_does_not_push_out_a_whole_one(three: Path) -> None:
    """Going on from 10 while a broken 100 lies there: with one to keep, the new 11 must be the one that stays."""
    os.truncate(three / "checkpoint-100" / "weights", 1)
    checkpoints.keep_until(three, 10)
    checkpoints.write(three, 11, fill)
    checkpoints.prune(three, keep=1)
    assert [path.name for path in three.iterdir()] == ["checkpoint-11"]


def test_writing_one_again_replaces_it(three: Path) -> None:
    checkpoints.write(three, 10, lambda folder: (folder / "weights").write_bytes(b"other"))
    assert (three / "checkpoint-10" / "weights").read_bytes() == b"other"
    assert checkpoints.problems(three / "checkpoint-10") == []
