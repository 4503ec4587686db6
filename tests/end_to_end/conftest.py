"""The tiny world of tests/tiny.py."""

from pathlib import Path

import pytest

from tests.tiny import write_world


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and its pairs."""
    return write_world(tmp_path_factory.mktemp("tiny"))
