"""What llama.cpp says of itself: it has no other place for a reason than its log, and that is this process's stderr."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

WAIT_S = 1.0  # at most, for what is said after a call has ended


@contextmanager
def heard() -> Iterator[list[str]]:
    """The lines that are written to this process's stdout and stderr meanwhile, by C++ too, without their time."""
    lines: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield lines
        finally:
            _settle(file.fileno())
            for number, before in zip((1, 2), kept, strict=True):
                os.dup2(before, number)
                os.close(before)
            file.seek(0)
            lines += dict.fromkeys(_told(line) for line in file.read().decode(errors="replace").splitlines() if line)


def _settle(descriptor: int) -> None:
    """Wait until a file has bytes and gets no more: llama.cpp writes its log from a thread of its own."""
    size, end = 0, time.monotonic() + WAIT_S
    while time.monotonic() < end:
        time.sleep(0.05)
        before, size = size, os.fstat(descriptor).st_size
        if size and size == before:
            return


def _told(line: str) -> str:
    """`0.01.349.281 E gguf_init_from_file: failed …` without time and level."""
    when, _, rest = line.partition(" ")
    return rest[2:] if when.replace(".", "").isdigit() and rest[1:2] == " " else line
