"""`lite reference verify|prune`: whether the cache is sound, and what can go."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite.cli.console import console
from lite.cli.options import JSON, Setting
from lite.cli.progress import LINE_EVERY_S, Shown, duration
from lite.cli.reference_cache import (
    CACHE,
    DAY_S,
    PANEL,
    as_dict,
    bytes_on_disk,
    file_of,
    given_for,
    opened,
    size,
    table,
)
from lite.errors import RecipeError, raise_collected

if TYPE_CHECKING:
    from lite.reference.store import Store
    from lite.reference.upkeep import Stored, Verified

KEYS = Setting("keys", str, ("KEY …",), "", "The first letters of keys that `lite reference ls` shows.", (), "Argument")
UNUSED = Setting(
    "unused_days", float, ("--unused-days",), "NUMBER", "What nobody has asked for in so many days.", (), PANEL
)
YES = Setting("yes", bool, ("--yes",), "", "Delete without a question.", ("default: off",), PANEL)
VERIFY = "Read everything that is in the cache, and mend what is wrong."
VERIFY_TEXT = f"""{VERIFY}

Every row is compared with its checksum, and every file of a model whose digest is remembered is read again. A row that
is not as it was written is deleted; of a file with other bytes under the same size and time the digest is corrected,
and what was computed with it is deleted; a cache that is no whole database is set aside. What is missing then is
computed again by the next run that needs it.

Exit status: 0 if all was sound, 2 if anything was wrong, though it is mended."""
PRUNE = "Delete the rows of some models, or what was not used for long."
PRUNE_TEXT = f"""{PRUNE}

Shows what would go and how much that is; deletes with --yes, or after a question on a terminal. What was deleted is
computed again by the next run that needs it."""


def verify(arguments: Sequence[str]) -> int:
    """Verify as the arguments say, or show their help; return the exit status."""
    given = given_for(arguments, [CACHE, JSON], program="verify", text=VERIFY_TEXT)
    if given is None:
        return 0
    found = None
    with opened(given) as (store, progress):
        if store:
            progress.stage("reading every row, and the files of models whose digests are remembered")
            found = store.verify(_Bytes(progress))
    path = file_of(given)
    if given.get("json"):
        print(json.dumps({"path": str(path), **_verified(found)}))
    else:
        print("\n".join(_findings(path, found)))
    return 0 if found is None or found.sound else 2


def prune(arguments: Sequence[str]) -> int:
    """Delete what the arguments say, or show their help; return the exit status."""
    given = given_for(arguments, [UNUSED, YES, CACHE, JSON], program="prune", text=PRUNE_TEXT, positional=KEYS)
    if given is None:
        return 0
    keys, days = given.get("keys") or [], given.get("unused_days")
    if bool(keys) == (days is not None):
        expected = "Expected either KEY …, which `lite reference ls` shows, or --unused-days NUMBER."
        raise RecipeError(f"lite reference prune: what shall go? {expected}")
    if days is not None and not (isinstance(days, float) and days >= 0):
        raise RecipeError(f"--unused-days = {days!r}: expected a number, at least 0.")
    path, before, deleted = file_of(given), time.time(), False
    with opened(given) as (store, progress):
        held = store.identities() if store else []
        doomed = _named(path, held, keys) if keys else _unused(held, before - (days or 0) * DAY_S)
        if doomed and not given.get("json"):
            console().print(table(doomed))
        if doomed and (given.get("yes") or _agreed(progress, given)):
            _delete(store, doomed, None if keys else days, shown_at=before)
            deleted = True
    of_rows = sum(one.size_bytes for one in doomed)
    if given.get("json"):
        print(json.dumps({"deleted": deleted, "bytes": of_rows, "identities": [as_dict(one) for one in doomed]}))
    elif not doomed:
        print(f"{path}: nothing is there that was not used for {days:g} days")
    elif deleted:
        print(f"\ndeleted {size(of_rows)}; {path} has {size(bytes_on_disk(path))} now")
    else:
        print(f"\nnothing was deleted. To delete {size(of_rows)}, add --yes")
    return 0


class _Bytes:
    """Tells how much of the files was read, in a line every few seconds."""

    def __init__(self, progress: Shown) -> None:
        self.progress = progress
        self.began_s = time.monotonic()
        self.next_line_s = self.began_s + LINE_EVERY_S

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now >= self.next_line_s:
            self.next_line_s = now + LINE_EVERY_S
            left_s = (now - self.began_s) * (total_bytes - done_bytes) / done_bytes
            self.progress.note(f"{size(done_bytes)} of {size(total_bytes)}  {duration(left_s)} left")


def _verified(found: "Verified | None") -> dict[str, Any]:
    if found is None:
        return {"sound": True, "rows": 0, "broken": 0, "files": 0, "changed": [], "dropped": [], "set_aside": []}
    return {
        "sound": found.sound,
        **found._asdict(),
        "changed": [str(file) for file in found.changed],
        "dropped": [identity.key.hex() for identity in found.dropped],
        "set_aside": [str(file) for file in found.set_aside],
    }


def _findings(path: Path, found: "Verified | None") -> Iterator[str]:
    """What was wrong, and what was done about it."""
    if found is None:
        yield f"{path}: nothing is there yet"
        return
    read = f"{path}: {found.rows} rows and {found.files} files of models read"
    if found.sound:
        yield f"{read}, all sound"
        return
    yield f"{read}, and not all were sound:"
    if found.broken:
        yield f"  {found.broken} rows were not as they were written: deleted"
    for file in found.changed:
        yield f"  {file} has other bytes than it had, under the same size and time: its digest is corrected"
    for identity in found.dropped:
        yield f"  the rows of {identity.description}, computed with such a file: deleted"
    for file in found.set_aside:
        yield f"  the database was not whole: set aside as {file}, and a new one begun"
    yield "Nothing wrong is left. What is missing is computed again by the next run that needs it."


def _named(path: Path, held: Sequence["Stored"], keys: Sequence[str]) -> list["Stored"]:
    """What the keys' first letters mean. Raises RecipeError for letters that are not those of one."""
    found, problems = [], []
    for letters in keys:
        meant = [one for one in held if one.key.hex().startswith(letters.lower())]
        found += meant if len(meant) == 1 else []
        if len(meant) != 1:
            those = f" ({', '.join(one.key.hex() for one in meant)})" if meant else ""
            problems.append(f"{letters}: {len(meant) or 'no'} keys begin so{those}")
    advice = "Expected the first letters of one key each, as `lite reference ls` shows them."
    raise_collected(RecipeError, f"{path}: it is not clear what shall go:", problems, advice)
    return list(dict.fromkeys(found))


def _unused(held: Sequence["Stored"], since: float) -> list["Stored"]:
    return [one for one in held if one.last_used is None or one.last_used < since]


def _agreed(progress: Shown, given: dict[str, Any]) -> bool:
    """What the user answers, if there is one to ask."""
    if given.get("json") or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    progress.console.print("Delete these rows? \\[y/N] ", end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _delete(store: "Store", doomed: Sequence["Stored"], days: float | None, *, shown_at: float) -> None:
    if days is None:
        for one in doomed:
            store.prune(prefix=one.key.hex())
    else:  # at once; what grew old while the user thought about it was not shown, and stays
        store.prune(unused_days=days + (time.time() - shown_at) / DAY_S)
