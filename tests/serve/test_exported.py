"""The file that stands for a model is made once, and anew when what it is made of changes."""

import json
import shutil
from pathlib import Path

import pytest

from lite.errors import ExportError
from lite.model.catalog import BUNDLED_MODEL
from lite.reference.database import default_folder
from lite.serve.exported import exported
from lite.train.progress import Quiet
from tests import served


def test_is_made_once_and_anew_after_a_change(tmp_path: Path) -> None:
    model = tmp_path / "mine"
    shutil.copytree(BUNDLED_MODEL, model)
    first, name = exported(str(model), check=False, progress=Quiet())
    assert (name, first.parent.parent) == ("mine", default_folder() / "serve")
    made = first.stat().st_mtime_ns
    assert exported(str(model), check=False, progress=Quiet())[0].stat().st_mtime_ns == made
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"temperature": 0.5}))
    second, _ = exported(str(model), check=False, progress=Quiet())
    assert second != first
    assert not first.exists()
    assert second.read_bytes()[:4] == b"GGUF"
    assert list(second.parent.glob("*.gguf")) == [second]
    shutil.rmtree(second.parent)


def test_models_whose_folders_have_one_name_leave_each_other_alone(tmp_path: Path) -> None:
    files = []
    for place in ("one", "other"):
        shutil.copytree(BUNDLED_MODEL, tmp_path / place / "mine")
        config = tmp_path / place / "mine" / "generation_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"note": place}))
        files.append(exported(str(tmp_path / place / "mine"), check=False, progress=Quiet())[0])
    assert all(file.is_file() for file in files)
    for file in files:
        shutil.rmtree(file.parent)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    monkeypatch.setenv("LITE_CACHE", str(taken))
    with pytest.raises(ExportError, match=r"tuned-\w+: cannot be written to: Not a directory"):
        exported(str(served.adapter()), check=False, progress=Quiet())
