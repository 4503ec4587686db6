"""The machine: what a run notes of it, and how much memory has been taken."""

import ctypes
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import lite
from lite.errors import RunError

PEAK_OF_PROCESS, FORGET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "triton")


def environment(device: torch.device) -> dict[str, Any]:
    """What a result may depend on beside the recipe and the data: versions, commit, device, CPU, threads."""
    return {
        "lite": lite.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: _version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": [name for name, has in sorted(torch.cpu.get_capabilities().items()) if has is True],
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def require_one_process() -> None:
    """Raise RunError under a launcher of several processes: each would train the whole run, in the same folder."""
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise RunError(
            f"WORLD_SIZE = {processes}: lite trains in one process, on one GPU. "
            "Start it without torchrun or accelerate launch, or unset WORLD_SIZE."
        )


def peak_bytes(device: torch.device) -> int:
    """Most memory taken so far. CUDA: what torch allocated since `make_ready`; CPU: the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name == "nt":
        import psutil  # which accelerate brings

        return psutil.Process().memory_info().peak_wset
    if PEAK_OF_PROCESS.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", PEAK_OF_PROCESS.read_text())
        return int(found.group(1)) * 1024
    import resource  # is not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def make_ready(device: torch.device) -> None:
    """Let the peak begin anew. CPU: from here on keep the pages that are freed, where the C library can be told to.

    glibc hands every freed activation back to the system, which then clears the pages anew for the next one: a tenth
    of a step's time and more. What is kept is used again, so the peak stays about what it was.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if sys.platform != "linux":
        return
    if hasattr(library := ctypes.CDLL(None), "mallopt"):  # glibc
        library.malloc_trim(0)  # what a reference that was read and freed has left
        library.mallopt(M_MMAP_THRESHOLD, 2**30)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    with suppress(OSError):  # where /proc cannot be written to, the peak is that of the whole process
        FORGET_PEAK.write_text("5")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of lite's own source, with a + if it was changed since; None outside a git repository."""
    root = Path(lite.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        told = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None
