"""Where an export is written until it has its name."""

from pathlib import Path

import pytest

from lite.errors import ExportError
from lite.export.export import _aside


def test_two_that_write_to_one_place_do_not_meet(tmp_path: Path) -> None:
    """Nor is anything left of either."""
    with _aside(tmp_path / "a.gguf") as one:
        (one / "a.gguf").write_text("one")
        with _aside(tmp_path / "a.gguf") as other:
            (other / "a.gguf").write_text("other")
            assert (one / "a.gguf").read_text() == "one"
        assert (one / "a.gguf").is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_and_one_that_fills_up(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="file: cannot be written to"), _aside(tmp_path / "file" / "a"):
        pass
    with pytest.raises(ExportError, match="a: was not written: No space left"), _aside(tmp_path / "a"):
        raise OSError(28, "No space left on device")
