"""What a figure depends on, and how it is taken: the machine, who else computed on it, contenders taken in turn.

Contenders run each in a process of its own, one after the other, round after round. Before each the others on the
machine are waited for; what share of it they took all the same is kept beside every figure, and rounds in which it was
a small one count before those in which it was not. CPU seconds are kept beside those of the clock: they suffer less.
On a machine that is never quiet, OMP_NUM_THREADS=1 leaves the other cores to whoever wants them.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS")  # make a CPU behave as a lesser one
PACKAGES = ("torch", "transformers", "peft", "trl")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
STATUS, FORGET_PEAK, BUSY = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/stat")
SLACK = 0.1  # of the machine, which others may take beside the cores that are left to them
PATIENCE_S = 45.0

Found = dict[str, Any]


def machine() -> Found:
    """What the figures depend on."""
    import torch

    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")), "")
    return {
        "commit": _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "--", "lite", "bench") else ""),
        "cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "features": [feature for feature in FEATURES if f" {feature}" in cpu],
        "quiet_below": quiet_share(), "limited_by": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "load_at_start": os.getloadavg(), "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }  # fmt: skip


def child(program: Path, arguments: Sequence[str], environment: dict[str, str] | None = None) -> Found:
    """The JSON object in the last line that a program prints, run in a process of its own; and the others' share."""
    with watched() as load:
        done = subprocess.run(
            [sys.executable, str(program), *arguments], capture_output=True, text=True, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **(environment or {})},
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{program.name} {arguments[0]} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), **load}


def apart(act: Callable[[], Found]) -> Found:
    """What `act` finds in a fork of this process, whose memory is its own and where nothing is imported again.

    This process must not have computed anything: threads do not survive a fork, and CUDA does not.
    """
    reading, writing = os.pipe()
    if (child_id := os.fork()) == 0:
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as pipe:
                json.dump(act(), pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child_id, 0)
    if os.WIFSIGNALED(status):
        return {"out_of_memory": f"killed by signal {os.WTERMSIG(status)}"}
    return json.loads(told) if status == 0 else {"failed": f"ended with {os.waitstatus_to_exitcode(status)}"}


@contextmanager
def watched() -> Iterator[Found]:
    """What comes out is filled when the block ends: `others`, the share of the machine that other processes took."""
    found: Found = {}
    start, busy, own = time.perf_counter(), _busy_s(), _own_s()
    yield found
    elapsed = time.perf_counter() - start
    found["others"] = round(max(0.0, (_busy_s() - busy - (_own_s() - own)) / (elapsed * (os.cpu_count() or 1))), 3)


def quiet_share() -> float:
    """How much of the machine others may take while a figure still counts: OMP_NUM_THREADS may leave cores to them."""
    cores = os.cpu_count() or 1
    return 1 - min(int(os.environ.get("OMP_NUM_THREADS", cores)), cores) / cores + SLACK


def wait_for_quiet() -> None:
    """Until two seconds have passed in which others left room, or patience is at its end."""
    until, calm = time.monotonic() + PATIENCE_S, 0
    while calm < 2 and time.monotonic() < until:
        with watched() as load:
            time.sleep(1)
        calm = calm + 1 if load["others"] <= quiet_share() - SLACK / 2 else 0


def in_turn(contenders: dict[str, Callable[[bool], Found]], rounds: int) -> dict[str, list[Found]]:
    """What each contender found in every round, in which all of them run one after the other, when others are quiet.

    A contender is told whether the round is the last.
    """
    found: dict[str, list[Found]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, run in contenders.items():
            wait_for_quiet()
            found[name].append(run(number == rounds - 1))
            print(f"{name}: {_line(found[name][-1])}", file=sys.stderr)
    return found


def counted(rounds: Sequence[Found]) -> list[Found]:
    """The rounds that count: the quiet ones; all if there is none."""
    return [one for one in rounds if one["others"] <= quiet_share()] or list(rounds)


def median(rounds: Sequence[Found], key: str) -> float:
    """Over the rounds that count, and over all that they list under the key."""
    values = [one[key] for one in counted(rounds)]
    return statistics.median(v for value in values for v in (value if isinstance(value, list) else [value]))


def read_lines(path: Path) -> list[Found]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def save(result: Found, path: Path | None) -> None:
    """Write the figures, if asked for."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def command() -> str:
    """The line that these figures come from, with what limits the machine."""
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    return " ".join([*limits, "python", *sys.argv])


def peak_bytes() -> int:
    """High-water mark of this process's resident memory, since `forget_peak`."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Let the high-water mark begin anew."""
    FORGET_PEAK.write_text("5")


def _line(found: Found) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items() if isinstance(value, int | float))


def _busy_s() -> float:
    """Seconds that all cores have worked for anybody, the hypervisor's other guests included."""
    user, nice, system, _idle, _wait, *others = map(int, BUSY.read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def _own_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parents[1]), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
