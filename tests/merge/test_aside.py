"""Folders aside: what a killed process has left goes, what a living one writes stays."""

import os
import platform
import subprocess
from pathlib import Path

import pytest

from lite.errors import ExportError
from lite.merge.aside import aside, publish


def test_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    """Of this machine and this name: who writes elsewhere cannot be seen from here."""
    with subprocess.Popen(["true"]) as ended:
        pass
    here = f"unfinished-{platform.node()}"
    stay = [f".a.{here}-{os.getpid()}-1", f".a.unfinished-elsewhere-{ended.pid}-1", f".b.{here}-{ended.pid}-1"]
    for name in (f".a.{here}-{ended.pid}-1", *stay):
        (tmp_path / name / "inner").mkdir(parents=True)
    with aside(tmp_path / "a") as folder:
        assert {path.name for path in tmp_path.iterdir()} == {*stay, folder.name}
    assert {path.name for path in tmp_path.iterdir()} == set(stay)


def test_an_empty_folder_gives_way_and_nothing_else_does(tmp_path: Path) -> None:
    """It is as open to others as any folder."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full" / "inner").mkdir(parents=True)
    for name in ("empty", "new"):
        with aside(tmp_path / name) as folder:
            (folder / "x").touch()
            publish(folder, tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["x"]
        assert (tmp_path / name).stat().st_mode == (tmp_path / "full").stat().st_mode
    for name in ("file", "full"):
        with aside(tmp_path / name) as folder, pytest.raises(ExportError, match="something has appeared there"):
            publish(folder, tmp_path / name)
    assert (tmp_path / "full" / "inner").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file", "full", "new"}
