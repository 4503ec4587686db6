"""`lite reference ls`: what the cache holds; and how the other commands open and list it."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lite import signatures
from lite.cli import options
from lite.cli.console import console
from lite.cli.options import JSON, Setting
from lite.cli.progress import Shown, shown

if TYPE_CHECKING:
    from lite.reference.store import Store
    from lite.reference.upkeep import Stored

PANEL = "Command"
CACHE = next(setting for setting in options.settings(signatures.find("dpo")) if setting.key == "cache")
LS = "List what the cache holds, by what it was computed with."
DAY_S = 86400.0


def ls(arguments: Sequence[str]) -> int:
    """Print what the arguments ask for, or their help; return the exit status."""
    given = given_for(arguments, [CACHE, JSON], program="ls", text=LS)
    if given is None:
        return 0
    with opened(given) as (store, _):
        held = store.identities() if store else []
    path = file_of(given)
    if given.get("json"):
        total = {"rows": sum(one.rows for one in held), "top_rows": sum(one.tops for one in held)}
        file = {"path": str(path), "bytes": bytes_on_disk(path)}
        print(json.dumps({**file, **total, "identities": [as_dict(one) for one in held]}))
    elif not held:
        print(f"{path}: nothing is there yet")
        print("fill it   lite precompute dpo --model MODEL --data PAIRS.jsonl")
    else:
        console().print(table(held))
        count = f"{len(held)} reference" + ("s" if len(held) > 1 else "")
        rows = sum(one.rows for one in held)
        print(f"\n{path}: {rows} rows of {count}, {size(bytes_on_disk(path))} on disk")
    return 0


@contextmanager
def opened(given: dict[str, Any], *, make: bool = False) -> Iterator[tuple["Store | None", Shown]]:
    """The store of the folder that was named, with progress on stderr; None where none is yet, unless `make`."""
    from lite.cli import session

    session.silence()
    with shown() as progress:
        if make or file_of(given).exists():
            from lite.reference.store import Store

            with Store.open(file_of(given).parent) as store:
                yield store, progress
        else:
            yield None, progress


def file_of(given: dict[str, Any]) -> Path:
    """The cache's file, in the folder that was named or in the default one."""
    from lite.reference.database import NAME, default_folder

    return (Path(given["cache"]).expanduser() if "cache" in given else default_folder()) / NAME


def size(size_bytes: int) -> str:
    """A size for people: `3.1 KiB`, `14.0 MiB`, `9.1 GiB`."""
    power = min(int(math.log2(max(size_bytes, 1)) // 10), 3)
    return f"{size_bytes / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}" if power else f"{size_bytes} B"


def given_for(
    arguments: Sequence[str], settings: Sequence[Setting], *, program: str, text: str, positional: Setting | None = None
) -> dict[str, Any] | None:
    """What was typed; None if that was a call for help, which is shown."""
    if {"-h", "--help"} & set(arguments):
        from lite.cli import help

        first = [positional] if positional else []
        help.verb(" ".join([f"lite reference {program}", *(one.left for one in first)]), text, [*first, *settings])
        return None
    from lite.cli.parse import parse

    name = positional.key if positional else ""
    return parse(arguments, settings, program=f"lite reference {program}", positional=name, many=True)


def table(held: Sequence["Stored"]) -> Table:
    """A line for each identity."""
    page = Table(box=None, padding=(0, 2, 0, 0))
    for name, justify in (("key", "left"), ("rows", "right"), ("top-k", "right"), ("size", "right"), ("used", "left")):
        page.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    page.add_column("of", overflow="fold")
    for one in held:
        used = "–" if one.last_used is None else _ago(time.time() - one.last_used)
        figures = (str(one.rows), str(one.tops or ""), size(one.size_bytes), used)
        page.add_row(one.key.hex()[:8], *figures, Text(one.description))
    return page


def _ago(seconds: float) -> str:
    return "just now" if seconds < 60 else f"{seconds // DAY_S:.0f} d ago" if seconds >= DAY_S else _hours(seconds)


def _hours(seconds: float) -> str:
    return f"{seconds // 3600:.0f} h ago" if seconds >= 3600 else f"{seconds // 60:.0f} min ago"


def as_dict(one: "Stored") -> dict[str, Any]:
    """What is kept under an identity, for JSON: what it was computed with, how much, and when it was used."""
    fields = ("model", "quantisation", "dtype", "adapter", "adapter_name", "whole", "weights", "format")
    return {
        "key": one.key.hex(),
        **{name: getattr(one.identity, name, None) for name in fields},
        "rows": one.rows,
        "top_rows": one.tops,
        "bytes": one.size_bytes,
        "first_used": one.first_used,
        "last_used": one.last_used,
    }


def bytes_on_disk(path: Path) -> int:
    """The file with its log."""
    files = (path, path.with_name(f"{path.name}-wal"))
    return sum(file.stat().st_size for file in files if file.exists())
