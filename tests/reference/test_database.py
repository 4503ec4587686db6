"""Whatever happens to the cache's file, no wrong row comes out of it, and lite goes on with a new one."""

import json
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lite.errors import CacheError
from lite.reference import database
from lite.reference.rows import Row
from lite.reference.store import Store
from lite.reference.weights import Identity

Rows = Callable[..., list[Row]]


@pytest.fixture
def filled(tmp_path: Path, identity: Identity, rows: Rows) -> Path:
    """The folder of a closed store of 300 rows."""
    with Store.open(tmp_path / "filled") as store:
        store.put(identity, rows(300, length=100))
    return tmp_path / "filled"


def scribble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), 8192):  # the first page is whole, and every second one rubbish
        content[place + 4096 : place + 8192] = random.Random(place).randbytes(4096)
    path.write_bytes(content)


def set_sql(statement: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        connection = sqlite3.connect(path)
        connection.execute(statement)
        connection.commit()
        connection.close()

    return change


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.write_bytes(b"These are not the rows you are looking for." * 200), "not a database"),
        (scribble, "malformed"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "malformed"),
        (lambda path: os.truncate(path, 50), "malformed"),
        (set_sql("PRAGMA user_version = 99"), "version 99 of the tables, where this lite has version 1"),
        (set_sql("PRAGMA user_version = 0"), "version 0 of the tables"),
        (set_sql("PRAGMA application_id = 7"), "another program's database"),
        (set_sql("ALTER TABLE logps RENAME COLUMN total TO sum"), "its tables are not those of version 1"),
        (set_sql("DROP TABLE files"), "its tables are not those of version 1"),
    ],
    ids=["text", "scribbled", "half", "stump", "newer", "version 0", "another program", "column", "table"],
)
def test_a_broken_file_is_set_aside_with_a_word(
    filled: Path, identity: Identity, rows: Rows, caplog: pytest.LogCaptureFixture, harm, said: str
) -> None:
    harm(filled / "reference.sqlite")
    harmed = (filled / "reference.sqlite").read_bytes()
    with Store.open(filled) as store:
        found = store.get(identity, [row.key for row in rows(300, length=100)])
        assert found == {}
        assert store.set_aside == (filled / "reference.sqlite.broken-1",)
        assert store.put(identity, rows(2)) == 2
    assert said in caplog.text
    assert "set aside as reference.sqlite.broken-1" in caplog.text
    assert (filled / "reference.sqlite.broken-1").read_bytes() == harmed
    with Store.open(filled) as store:
        assert store.set_aside == ()
        assert len(store.get(identity, [row.key for row in rows(2)])) == 2


def test_a_second_broken_file_has_a_name_of_its_own(filled: Path) -> None:
    for number in (1, 2, 3):
        (filled / "reference.sqlite").write_bytes(bytes([number]) * 1000)
        with Store.open(filled) as store:
            assert store.set_aside == (filled / f"reference.sqlite.broken-{number}",)
    assert [(filled / f"reference.sqlite.broken-{number}").read_bytes()[0] for number in (1, 2, 3)] == [1, 2, 3]


def test_an_empty_file_is_begun(tmp_path: Path, identity: Identity, rows: Rows) -> None:
    (tmp_path / "reference.sqlite").touch()
    (tmp_path / "reference.sqlite-wal").write_bytes(b"of another file" * 1000)
    with Store.open(tmp_path) as store:
        assert store.set_aside == ()
        assert store.put(identity, rows(3)) == 3
        assert store.verify().sound


def test_a_log_of_rubbish_is_passed_over(filled: Path, identity: Identity, rows: Rows) -> None:
    (filled / "reference.sqlite-wal").write_bytes(random.Random(0).randbytes(100_000))
    with Store.open(filled) as store:
        given = rows(300, length=100)
        found = store.get(identity, [row.key for row in given])
    assert all(torch.equal(found[row.key], row.tokens) for row in given)


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_never_gives_a_wrong_row(filled: Path, identity: Identity, rows: Rows, seed: int) -> None:
    """Ten times each: bits flipped, bytes overwritten, pages swapped, the end cut off; then all is computed again."""
    given, draw = rows(300, length=100), random.Random(seed)
    keys, sound = [row.key for row in given], (filled / "reference.sqlite").read_bytes()
    for _ in range(10):
        content = bytearray(sound)
        place, other = draw.randrange(len(content)), draw.randrange(len(content) - 4096)
        match seed:
            case 0:
                content[place] ^= 1 << draw.randrange(8)
            case 1:
                content[place : place + 500] = draw.randbytes(len(content[place : place + 500]))
            case 2:
                content[:4096], content[other : other + 4096] = content[other : other + 4096], content[:4096]
            case 3:
                del content[place:]
        shutil.rmtree(filled)
        filled.mkdir()
        (filled / "reference.sqlite").write_bytes(content)
        with Store.open(filled) as store:
            found = store.get(identity, keys)
            assert all(torch.equal(found[row.key], row.tokens) for row in given if row.key in found)
            store.put(identity, [row for row in given if row.key not in found])
            found = store.get(identity, keys)
            assert all(torch.equal(found[row.key], row.tokens) for row in given)
            store.verify()
            assert store.verify()._replace(set_aside=()).sound


def test_it_breaks_while_it_is_open(filled: Path, identity: Identity, rows: Rows) -> None:
    """Whoever finds it out, by whatever it was about to do, goes on with a new one; so does the other."""
    given = rows(300, length=100)
    with Store.open(filled) as one, Store.open(filled) as other:
        scribble(filled / "reference.sqlite")
        assert one.put(identity, given) == 300
        assert one.set_aside == (filled / "reference.sqlite.broken-1",)
        assert (filled / "reference.sqlite.broken-1-wal").exists()  # the other still has it open
        assert other.get(identity, [row.key for row in given]).keys() <= {row.key for row in given}
        assert other.set_aside == ()
    with Store.open(filled) as store:
        assert len(store.get(identity, [row.key for row in given])) == 300


def test_verify_reads_the_whole_structure(filled: Path, identity: Identity, rows: Rows) -> None:
    """An index entry that points to the wrong row: no checksum of a row knows of it."""
    with Store.open(filled) as store:
        assert store.verify().sound
    connection = sqlite3.connect(filled / "reference.sqlite")
    (page,) = connection.execute(
        "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_logps_1'"
    ).fetchone()
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    connection.close()
    content = bytearray((filled / "reference.sqlite").read_bytes())
    content[page * size - 20] ^= 1
    (filled / "reference.sqlite").write_bytes(content)
    with Store.open(filled) as store:
        found = store.verify()
        assert not found.sound
        assert found.set_aside == (filled / "reference.sqlite.broken-1",)
        assert store.identities() == []


@pytest.fixture
def no_room() -> Iterator[None]:
    """No file may have more than 300 KB: to a program that is a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_told_and_loses_nothing(store: Store, identity: Identity, rows: Rows, no_room: None) -> None:
    given, many = rows(50), rows(1000, first=1000, length=300)
    store.put(identity, given)
    with pytest.raises(CacheError, match=r"cannot be kept there: (disk I/O error|.* full)\. .*--cache DIR"):
        store.put(identity, many)
    assert len(store.get(identity, [row.key for row in given + many])) == 50
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert store.put(identity, many) == 1000
    assert store.set_aside == ()


def test_a_path_through_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"file/cache: .*the folder cannot be made: Not a directory\. .*--cache DIR"):
        Store.open(tmp_path / "file" / "cache")


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_may_not_be_written_to(what: str, identity: Identity, rows: Rows) -> None:
    """In a process without root's rights, for which permissions count."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Store.open(folder) as store:
            store.put(identity, rows(1))
        (folder / "reference.lock").chmod(0o666)
        (folder / "reference.sqlite").chmod(0o444)
        folder.chmod(0o555 if what == "folder" else 0o777)
        child = os.fork()
        if child == 0:
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                with Store.open(folder) as store:
                    store.put(identity, rows(2))
            except CacheError as error:
                said = "readonly database. Check its permissions, or choose another folder with --cache DIR."
                os._exit(0 if str(error).startswith(str(folder)) and str(error).endswith(said) else 2)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        folder.chmod(0o777)
    assert status == 0


def test_a_transaction_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C between two statements."""
    opened = database.Database(tmp_path)

    def interrupted(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO model_files VALUES ('weights', 'digest')")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened.write(interrupted)
    count = "SELECT count(*) FROM model_files"
    assert opened.run(lambda connection: connection.execute(count).fetchone()) == (0,)
    opened.write(lambda connection: connection.execute("INSERT INTO model_files VALUES ('weights', 'digest')"))
    assert opened.run(lambda connection: connection.execute(count).fetchone()) == (1,)
    opened.close()


def test_somebody_who_does_not_let_go(
    store: Store, identity: Identity, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.1)
    holder = sqlite3.connect(store.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with Store.open(store.path.parent) as waiting:
        with pytest.raises(CacheError, match=r"locked\. Another process has held it for"):
            waiting.put(identity, rows(1))
        assert waiting.missing(identity, [rows(1)[0].key])  # reading goes on
    holder.execute("ROLLBACK")
    holder.close()


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"LITE_CACHE": "/fast/cache"}, "/fast/cache"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/lite"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/lite"),
        ("linux", {}, "/home/me/.cache/lite"),
        ("darwin", {}, "/home/me/Library/Caches/lite"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/lite"),
        ("win32", {}, "/home/me/AppData/Local/lite"),
    ],
)
def test_the_platforms_place_for_caches(
    platform: str, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LITE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "HOME": "/home/me"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert database.default_folder() == Path(expected)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What filling.py has found, which forks and kills."""
    script, folder = Path(__file__).with_name("filling.py"), tmp_path_factory.mktemp("processes")
    told = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)


def test_two_processes_fill_at_once(processes: dict[str, dict]) -> None:
    """Half of the rows are the same in both: each is there once, whole, whoever came first."""
    found = processes["together"]
    assert found["ended"] == [0, 0]
    assert found["new"] == found["rows"] == 900
    assert found["wrong"] == 0
    assert found["set_aside"] == 0


def test_killed_while_it_fills(processes: dict[str, dict]) -> None:
    """Every transaction that was committed is there, none is there in part, and no row is wrong."""
    kills = processes["kills"]
    assert len(kills) == 10
    assert all(kill["ended"] == -9 for kill in kills)
    assert all(kill["lost"] == kill["parts"] == kill["wrong"] == kill["set_aside"] == 0 for kill in kills)
    assert all(kill["log"] for kill in kills)  # of the file's two parts, the log was left over
    assert max(kill["committed"] for kill in kills) > 1
    assert processes["finished"] == {"missing": 0, "wrong": 0, "sound": True}


def test_two_processes_find_it_broken_at_once(processes: dict[str, dict]) -> None:
    """One sets it aside; the other does not set aside what the first one began."""
    found = processes["broken"]
    assert found["ended"] == [0, 0]
    assert found["set_aside"] == 1
    assert found["rows"] == 400
    assert found["wrong"] == 0
