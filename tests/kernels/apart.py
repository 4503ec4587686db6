"""Tests in a process of their own, for Triton decides when it is imported whether its interpreter runs the kernels."""

import os
import subprocess
import sys
from pathlib import Path


def run(file: str, **environment: str) -> None:
    """Let pytest run a file of this folder; none of its tests may fail or be skipped."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).with_name(file))],
        capture_output=True, text=True, check=False, env={**kept, **environment},
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout[-4000:] + outcome.stderr[-2000:]
    assert "skipped" not in outcome.stdout
