"""A server that answers as OpenAI's API does: a GGUF in llama.cpp, until it is asked to stop."""

import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lite.errors import ExportError
from lite.gguf import llama
from lite.gguf.llama import Llama

HEARS_S = 0.5  # a signal that another thread was given is heard when this one next wakes
ENDING = (signal.SIGINT, signal.SIGTERM)


class Door(NamedTuple):
    """Where a server listens, and who may come in."""

    host: str = llama.LOOPBACK  # of IPv6 without brackets
    port: int = 8080  # 0: a free one
    api_key: str | None = None


def require_guarded(door: Door) -> None:
    """Raise ExportError if anyone who reaches this machine may ask, without a key; an empty one is none."""
    if not door.api_key and not is_loopback(door.host):
        raise ExportError(
            f"--host {door.host}: whoever reaches this machine could ask the model, for no --api-key is set. Set one, "
            "or pass --force to let everyone in."
        )


def require_free(door: Door) -> None:
    """Raise ExportError if the address cannot be listened at: before a model is exported for it."""
    family = socket.AF_INET6 if ":" in door.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        if os.name != "nt":  # as servers do: a port that was left a moment ago is free
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((door.host, door.port))
        except OSError as error:
            raise ExportError(
                f"--host {door.host} --port {door.port}: cannot be listened at: {error.strerror or error}. Another, "
                "or --port 0 for a free one."
            ) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    path: Path,
    name: str,
    door: Door,
    *,
    context: int = llama.CONTEXT,
    parallel: int = llama.PARALLEL,
    threads: int | None = None,
    ready: Callable[[Llama], None] = lambda server: None,
) -> None:
    """Serve the file under `name` until the process is asked to stop; `ready` is told when it answers.

    context: tokens of all requests under way together; parallel: how many those may be. No page of another origin may
    read an answer, though without a key it can have one computed. Raises ExportError in llama.cpp's words if it cannot
    serve the file there.
    """
    keys = [door.api_key] if door.api_key else []
    with _asked_to_stop() as stop:
        settings = {"context": context, "parallel": parallel, "threads": threads, "name": name}
        with llama.running(path, host=door.host, port=door.port, api_keys=keys, **settings) as server:
            ready(server)
            while not stop.wait(HEARS_S):
                pass


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a request of the system sets, instead of raising amid llama.cpp's threads."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in ENDING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
