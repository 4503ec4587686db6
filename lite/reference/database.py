"""The cache's file: one SQLite database that may be killed, cut short, scribbled on, and shared by processes.

It is in WAL mode, and syncs only when the log is folded into it (synchronous=NORMAL). A killed process loses the
transaction that it was in, and nothing else. A power cut may also lose the last transactions before it, in order; it
never leaves half of one. What is lost is computed again, so a sync per commit would buy nothing.

A file that turns out to be anything but a whole database of ours is set aside under a new name, and a new one begun.
"""

import contextlib
import logging
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from lite.errors import CacheError

log = logging.getLogger(__name__)

T = TypeVar("T")
NAME, LOCK = "reference.sqlite", "reference.lock"
APPLICATION, SCHEMA = 0x6C697465, 1  # "lite"; raise SCHEMA when a table changes
BUSY_S = 120.0  # another process holds the file for one transaction: a few seconds of rows, on a slow disk
# Tables with row ids: the indexes over (identity, key) stay small, and `missing` reads nothing else.
TABLES = (
    "CREATE TABLE identities (key BLOB PRIMARY KEY, fields TEXT NOT NULL, first_used REAL NOT NULL,"
    " last_used REAL NOT NULL)",
    "CREATE TABLE logps (identity BLOB NOT NULL, key BLOB NOT NULL, length INTEGER NOT NULL, total REAL NOT NULL,"
    " tokens BLOB NOT NULL, checksum BLOB NOT NULL, PRIMARY KEY (identity, key))",
    "CREATE TABLE tops (identity BLOB NOT NULL, key BLOB NOT NULL, length INTEGER NOT NULL, k INTEGER NOT NULL,"
    " logps BLOB NOT NULL, ids BLOB NOT NULL, checksum BLOB NOT NULL, PRIMARY KEY (identity, key))",
    "CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,"
    " inode TEXT NOT NULL, digest TEXT NOT NULL, checksum BLOB NOT NULL)",
    "CREATE TABLE model_files (weights TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (weights, digest))",
)
BROKEN = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
ADVICE = {
    sqlite3.SQLITE_FULL: "Make room",
    sqlite3.SQLITE_IOERR: "Look whether the disk is full or failing",
    sqlite3.SQLITE_READONLY: "Check its permissions",
    sqlite3.SQLITE_PERM: "Check its permissions",
    sqlite3.SQLITE_CANTOPEN: "Check its permissions",
    sqlite3.SQLITE_BUSY: f"Another process has held it for {BUSY_S:.0f} s: wait for that one, or end it",
}


class Broken(sqlite3.DatabaseError):
    """The file is no whole database of ours."""


def default_folder() -> Path:
    """$LITE_CACHE, or `lite` in the place that the platform keeps caches in. Raises CacheError without a home."""
    if named := os.environ.get("LITE_CACHE"):
        return Path(named).expanduser()
    try:
        if sys.platform == "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "lite"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "lite"
        # The XDG specification has relative paths ignored.
        named = os.environ.get("XDG_CACHE_HOME", "")
        return (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "lite"
    except RuntimeError:
        raise CacheError(
            "There is no home folder to keep the reference's log-probs in. Name one: --cache DIR."
        ) from None


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of it or nothing, with the right to write from the start: no other writer can come in between."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # what went wrong first is what matters
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        raise


class Database:
    """The open file. `set_aside` names the files that were found broken since it was opened."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.set_aside: list[Path] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(folder, f"the folder cannot be made: {error.strerror}", "Check the path") from None
        self._connection = self._connected()

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` returns; if it finds the file broken, then what it returns on a new one.

        Raises CacheError for a full disk, missing permissions, a process that does not let go.
        """
        try:
            return work(self._connection)
        except sqlite3.DatabaseError as error:
            if not _is_broken(error):
                raise self._told(error) from error
            self._connection.close()
            self._connection = self._connected(broken=str(error))
        try:
            return work(self._connection)
        except sqlite3.DatabaseError as error:
            raise self._told(error) from error

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The same, within one transaction."""

        def whole(connection: sqlite3.Connection) -> T:
            with transaction(connection):
                return work(connection)

        return self.run(whole)

    def close(self) -> None:
        """Fold the log into the file, if no other process has it open."""
        self._connection.close()

    def _connected(self, broken: str | None = None) -> sqlite3.Connection:
        """A connection to a sound file; `broken`: what is wrong with the one that was open until now."""
        try:
            with _alone(self.path.parent):
                # Another process may have found the same, and have set it aside already.
                if broken is not None and self.path.exists() and os.stat(self.path).st_ino == self._inode:
                    self._put_aside(broken)
                try:
                    return self._begun()
                except sqlite3.DatabaseError as error:
                    if not _is_broken(error):
                        raise
                    self._put_aside(str(error))
                    return self._begun()
        except sqlite3.DatabaseError as error:
            raise self._told(error) from error
        except OSError as error:
            raise _unusable(self.path.parent, str(error.strerror or error), "Check its permissions") from error

    def _begun(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        try:
            connection.text_factory = lambda text: text.decode("utf-8", "replace")  # damaged text fails its checksum
            connection.execute("PRAGMA cell_size_check = ON")
            _require_ours(connection)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            self._inode = os.stat(self.path).st_ino
        except BaseException:
            connection.close()
            raise
        return connection

    def _put_aside(self, why: str) -> None:
        """Give the file and its log another name. Python must not open it: closing it would drop SQLite's locks."""
        number = 1
        while (new := self.path.with_name(f"{NAME}.broken-{number}")).exists():
            number += 1
        for ending in ("", "-wal", "-shm", "-journal"):
            old = self.path.with_name(f"{NAME}{ending}")
            if old.exists():
                os.replace(old, new.with_name(f"{new.name}{ending}"))
        self.set_aside.append(new)
        log.warning(
            "%s cannot be used (%s). It was set aside as %s and a new one begun: what it held is computed again.",
            self.path, why, new.name,
        )  # fmt: skip

    def _told(self, error: sqlite3.DatabaseError) -> CacheError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        return _unusable(self.path, str(error), ADVICE.get(code, "Move the file away"))


def _require_ours(connection: sqlite3.Connection) -> None:
    """Make the tables in an empty file; raise Broken if another program or another version made the file."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    tables = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    if not tables and application == version == 0:
        with transaction(connection):
            for sql in TABLES:
                connection.execute(sql)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
    elif application != APPLICATION:
        raise Broken("another program's database")
    elif version != SCHEMA:
        raise Broken(f"version {version} of the tables, where this lite has version {SCHEMA}")
    elif not tables.issuperset(TABLES):
        raise Broken(f"its tables are not those of version {SCHEMA}")


def _is_broken(error: sqlite3.DatabaseError) -> bool:
    code = getattr(error, "sqlite_errorcode", 0)
    return isinstance(error, Broken) or code & 0xFF in BROKEN or code == sqlite3.SQLITE_IOERR_SHORT_READ


def _unusable(path: Path, why: str, advice: str) -> CacheError:
    kept = "the reference's log-probs cannot be kept there"
    return CacheError(f"{path}: {kept}: {why}. {advice}, or choose another folder with --cache DIR.")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While this process opens the file or sets it aside, no other does."""
    if os.name == "nt":
        yield  # no flock there, and a file that another process has open cannot be renamed
        return
    import fcntl

    with (folder / LOCK).open("a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
