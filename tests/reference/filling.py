"""Fills a store from several processes, and kills some; run by test_database.py as

    python filling.py FOLDER

Prints a JSON object of what was found afterwards. Each process is a fork of this one, which has no store open.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lite.reference.rows import Row
from lite.reference.store import Store
from lite.reference.weights import Identity, completion_key

IDENTITY = Identity("00" * 16, "none", "float32")
BATCH = 20  # rows in a transaction
KILLS = 10


def main(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {"together": together(folder / "together"), "broken": broken(folder / "broken"), **kills(folder / "killed")}


def together(folder: Path) -> dict[str, Any]:
    """Rows 0 … 599 by one, 300 … 899 by the other, from the making of the file on."""
    new = os.pipe()
    children = [fork(lambda start=start: fill(folder, range(start, start + 600), new[1])) for start in (0, 300)]
    ended = [wait(child) for child in children]
    os.close(new[1])
    with os.fdopen(new[0]) as lines:
        counts = [int(line.split()[1]) for line in lines]
    return {"ended": ended, "new": sum(counts), **content(folder, range(900))}


def broken(folder: Path) -> dict[str, Any]:
    """Both have it open when it breaks, and write then."""
    with Store.open(folder) as store:
        store.put(IDENTITY, [row(n) for n in range(2000, 2400)])
        path = store.path
    go = folder / "go"

    def work(start: int) -> None:
        with Store.open(folder) as store:
            (folder / f"ready-{start}").touch()
            while not go.exists():
                time.sleep(0.001)
            for first in range(start, start + 200, BATCH):
                # What one of them writes into the file that the other is setting aside is lost: a cache may lose.
                while store.missing(IDENTITY, [row(n).key for n in range(first, first + BATCH)]):
                    store.put(IDENTITY, [row(n) for n in range(first, first + BATCH)])

    children = [fork(lambda start=start: work(start)) for start in (0, 200)]
    while not all((folder / f"ready-{start}").exists() for start in (0, 200)):
        time.sleep(0.001)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(random.Random(0).randbytes(path.stat().st_size - 4096))
    go.touch()
    ended = [wait(child) for child in children]
    aside = len(list(folder.glob("*.broken-?")))
    return {"ended": ended, **content(folder, range(400)), "set_aside": aside}


def kills(folder: Path) -> dict[str, Any]:
    """Kill fills that would go on for long, at random moments, each amid rows of its own; then fill what is missing."""
    draw, outcomes, looked_at = random.Random(0), [], []
    for number in range(KILLS):
        start = number * 10**6
        outcome, committed = kill(folder, range(start, start + 10**6), draw.uniform(0, 0.03))
        # Beyond the last batch that was told of, one may be committed, and one in the making.
        numbers = range(start, max(committed) + 3 * BATCH)
        looked_at += batches(numbers)
        with Store.open(folder) as store:
            there = store.get(IDENTITY, [row(n).key for n in numbers])
            aside = len(store.set_aside)
        counts = {batch[0]: sum(row(n).key in there for n in batch) for batch in batches(numbers)}
        outcome["lost"] = sum(counts[first] != BATCH for first in committed)
        outcome["parts"] = sum(count not in (0, BATCH) for count in counts.values())
        outcome["wrong"] = sum(
            not torch.equal(there[row(n).key], row(n).tokens) for n in numbers if row(n).key in there
        )
        outcomes.append({**outcome, "committed": len(committed), "set_aside": aside})
    with Store.open(folder) as store:
        for batch in looked_at:
            store.put(IDENTITY, [row(n) for n in batch])
        sound = store.verify().sound
    found = content(folder, [n for batch in looked_at for n in batch])
    missing = len(looked_at) * BATCH - found["rows"]
    return {"kills": outcomes, "finished": {"missing": missing, "wrong": found["wrong"], "sound": sound}}


def kill(folder: Path, numbers: range, after_s: float) -> tuple[dict[str, Any], list[int]]:
    """Kill a fill so long after its first batch; how it ended, and the first row of each batch that it told of."""
    told = os.pipe()
    child = fork(lambda: fill(folder, numbers, told[1]))
    os.close(told[1])
    with os.fdopen(told[0]) as lines:
        committed = [int(lines.readline().split()[0])]
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        ended = wait(child)
        committed += [int(line.split()[0]) for line in lines]
    return {"ended": ended, "log": (folder / "reference.sqlite-wal").exists()}, committed


def fill(folder: Path, numbers: range, told: int) -> None:
    """Put what is missing, and tell of each batch that is committed, with how many of its rows were new."""
    with Store.open(folder) as store:
        for batch in batches(numbers):
            if store.missing(IDENTITY, [row(n).key for n in batch]):
                new = store.put(IDENTITY, [row(n) for n in batch])
                os.write(told, f"{batch[0]} {new}\n".encode())


def content(folder: Path, numbers: Sequence[int]) -> dict[str, int]:
    """How many rows there are, how many are not as they should be, and how many files were set aside now."""
    with Store.open(folder) as store:
        found = store.get(IDENTITY, [row(n).key for n in numbers])
        wrong = sum(not torch.equal(found[row(n).key], row(n).tokens) for n in numbers if row(n).key in found)
        return {"rows": len(found), "wrong": wrong, "set_aside": len(store.set_aside)}


def row(n: int) -> Row:
    """Row n, whoever asks."""
    return Row(completion_key([n], [n, n]), -torch.arange(n, n + 50, dtype=torch.float32) / 7)


def batches(numbers: range) -> list[range]:
    return [numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)]


def fork(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """Its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
