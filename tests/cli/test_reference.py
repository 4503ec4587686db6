"""`lite reference ls|verify|prune`: what is seen of a cache, and what becomes of it."""

import json
import os
import pty
import re
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lite.cli import main
from lite.cli.reference_cache import size
from lite.reference.rows import Row, TopRow
from lite.reference.store import Store
from lite.reference.weights import FileStamp, Identity, completion_key, file_digest

OLD = Identity("00" * 16, "nf4", "bfloat16", model="qwen-14b")
NEW = Identity("11" * 16, "none", "float32", "22" * 16, model="tiny", adapter_name="runs/x/adapter")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache's folder: of OLD three rows, last used 40 days ago; of NEW two, and likeliest words of one."""
    rows = [Row(completion_key([n], [n]), torch.full((500,), -0.5)) for n in range(3)]
    with Store.open(tmp_path / "cache") as store:
        store.put(OLD, rows)
        store.put(NEW, rows[:2])
        store.put_top(NEW, 2, [TopRow(rows[0].key, torch.tensor([[-0.1, -3.0]]), torch.tensor([[4, 5]]))])
    change(tmp_path / "cache", "UPDATE identities SET last_used = ? WHERE key = ?", time.time() - 40 * 86400, OLD.key)
    return tmp_path / "cache"


def change(cache: Path, sql: str, *values: object) -> None:
    with sqlite3.connect(cache / "reference.sqlite") as connection:
        connection.execute(sql, values)


def said(cache: Path, *arguments: str, capsys: pytest.CaptureFixture[str], status: int = 0) -> str:
    """What a command says on stdout."""
    assert main(["reference", *arguments, "--cache", str(cache)]) == status
    return capsys.readouterr().out


def held(cache: Path) -> dict[str, int]:
    """Rows by key."""
    with Store.open(cache) as store:
        return {one.key.hex(): one.rows for one in store.identities()}


def test_ls(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last used first."""
    lines = said(cache, "ls", capsys=capsys).splitlines()
    assert lines[0].split() == ["key", "rows", "top-k", "size", "used", "of"]
    assert lines[1].split()[:7] == [NEW.key.hex()[:8], "2", "1", "3.9", "KiB", "just", "now"]
    assert "tiny, float32" in lines[1]
    assert any(
        re.fullmatch(rf"{OLD.key.hex()[:8]} +3 +5.9 KiB +40 d ago +qwen-14b in nf4, *(bfloat16)? *", one)
        for one in lines
    )
    assert lines[-1].startswith(f"{cache / 'reference.sqlite'}: 5 rows of 2 references, ")


def test_ls_for_programs(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(cache, "ls", "--json", capsys=capsys))
    assert (found["path"], found["rows"], found["top_rows"]) == (str(cache / "reference.sqlite"), 5, 1)
    assert found["bytes"] >= (cache / "reference.sqlite").stat().st_size
    new, old = found["identities"]
    assert (old["key"], old["model"], old["quantisation"], old["dtype"]) == (
        OLD.key.hex(),
        "qwen-14b",
        "nf4",
        "bfloat16",
    )
    assert (new["adapter"], new["adapter_name"], new["top_rows"]) == ("22" * 16, "runs/x/adapter", 1)
    assert old["bytes"] == 3 * 500 * 4
    assert time.time() - old["last_used"] == pytest.approx(40 * 86400, abs=60)


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["prune", "--unused-days", "3"]])
def test_where_no_cache_is_none_is_made(tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    page = said(tmp_path / "none", *command, capsys=capsys)
    assert f"{tmp_path / 'none' / 'reference.sqlite'}: nothing is there" in page
    assert ("lite precompute dpo" in page) == (command == ["ls"])
    json.loads(said(tmp_path / "none", *command, "--json", capsys=capsys))
    assert not (tmp_path / "none").exists()


def test_the_default_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LITE_CACHE", str(tmp_path / "named"))
    assert main(["reference", "ls"]) == 0
    assert capsys.readouterr().out.startswith(str(tmp_path / "named" / "reference.sqlite"))


def test_verify_of_a_sound_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(cache, "verify", capsys=capsys).endswith("6 rows and 0 files of models read, all sound\n")
    found = json.loads(said(cache, "verify", "--json", capsys=capsys))
    assert found == {
        "path": str(cache / "reference.sqlite"), "sound": True, "rows": 6, "broken": 0, "files": 0, "changed": [],
        "dropped": [], "set_aside": [],
    }  # fmt: skip


def test_verify_tells_by_its_status_that_a_row_was_wrong(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once: it is mended then."""
    change(cache, "UPDATE logps SET total = 0 WHERE rowid = 1")
    page = said(cache, "verify", capsys=capsys, status=2)
    assert "6 rows and 0 files of models read, and not all were sound:" in page
    assert "1 rows were not as they were written: deleted" in page
    assert "computed again by the next run" in page
    assert said(cache, "verify", capsys=capsys).endswith("all sound\n")


def test_verify_reads_the_weights(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other bytes under the same size and time: what was computed with them goes."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a" * 100)
    stamp = FileStamp.of(weights)
    with Store.open(cache) as store:
        store.remember_file(stamp, file_digest(weights))
        store.remember_model(OLD.weights, [file_digest(weights)])
    assert "6 rows and 1 files of models read" in said(cache, "verify", capsys=capsys)
    with weights.open("r+b") as file:
        file.write(b"b")
    os.utime(weights, ns=(stamp.mtime_ns, stamp.mtime_ns))
    page = said(cache, "verify", capsys=capsys, status=2)
    assert f"{weights} has other bytes than it had" in page
    assert "the rows of qwen-14b in nf4, bfloat16, computed with such a file: deleted" in page
    assert held(cache) == {NEW.key.hex(): 2}


def test_verify_of_a_file_that_is_no_database(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "reference.sqlite").write_bytes(b"scribble" * 1000)
    found = json.loads(said(cache, "verify", "--json", capsys=capsys, status=2))
    assert found["set_aside"] == [str(cache / "reference.sqlite.broken-1")]
    assert found["sound"] is False


def test_prune_shows_and_deletes_only_when_told_to(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    letters = OLD.key.hex()[:6]
    page = said(cache, "prune", letters, capsys=capsys)
    assert OLD.key.hex()[:8] in page
    assert NEW.key.hex()[:8] not in page
    assert page.endswith("nothing was deleted. To delete 5.9 KiB, add --yes\n")
    assert len(held(cache)) == 2
    assert "deleted 5.9 KiB; " in said(cache, "prune", letters.upper(), "--yes", capsys=capsys)
    assert held(cache) == {NEW.key.hex(): 2}


def test_prune_of_what_was_not_used_for_long(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing is there that was not used for 41 days" in said(
        cache, "prune", "--unused-days", "41", capsys=capsys
    )
    found = json.loads(said(cache, "prune", "--unused-days", "39.5", "--json", capsys=capsys))
    assert (found["deleted"], found["bytes"], [one["key"] for one in found["identities"]]) == (
        False,
        6000,
        [OLD.key.hex()],
    )
    found = json.loads(said(cache, "prune", "--unused-days", "39.5", "--json", "--yes", capsys=capsys))
    assert found["deleted"] is True
    assert held(cache) == {NEW.key.hex(): 2}


def test_prune_of_several_keys(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [one.key.hex()[:8] for one in (OLD, NEW)]
    said(cache, "prune", *keys, keys[0], "--yes", capsys=capsys)
    assert held(cache) == {}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["prune"], "what shall go? Expected either KEY"),
        (["prune", "abc", "--unused-days", "3"], "what shall go?"),
        (["prune", "--unused-days", "-1"], "--unused-days = -1.0: expected a number, at least 0."),
        (["prune", "--unused-days", "nan"], "--unused-days = nan: expected"),
        (["prune", "--unused-days", "long"], "--unused-days = 'long': expected"),
        (["prune", "zz", "--yes"], "zz: no keys begin so"),
        (["prune", "", "--yes"], ": 2 keys begin so ("),
        (["ls", "more"], "more"),
        (["ls", "--jsn"], "--jsn: no such option. Did you mean --json?\nAll options: lite reference ls --help"),
        (
            ["verfy"],
            "verfy: no such command. Did you mean verify?\nExpected lite reference ls|verify|export|import|prune.",
        ),
    ],
)
def test_what_cannot_be_done(
    cache: Path, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reference", *arguments, "--cache", str(cache)]) == 2
    heard = capsys.readouterr()
    assert problem in heard.err
    assert heard.out == ""
    assert len(held(cache)) == 2


@pytest.mark.parametrize(("answer", "left"), [("y", 1), ("no", 2)])
def test_prune_asks_on_a_terminal(cache: Path, answer: str, left: int) -> None:
    ours, theirs = pty.openpty()
    code = "import sys; from lite.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "reference", "prune", OLD.key.hex(), "--cache", str(cache)]
    with subprocess.Popen(command, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, text=True) as process:
        os.write(ours, f"{answer}\n".encode())
        out, _ = process.communicate(timeout=60)
    asked = os.read(ours, 4096).decode()
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0
    assert "Delete these rows? [y/N]" in asked
    assert ("deleted 5.9 KiB" in out) == (left == 1)
    assert len(held(cache)) == left


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reference", *arguments]) == 0
    page = capsys.readouterr().out
    for command in ("ls", "verify", "export", "import", "prune"):
        assert re.search(rf"^  {command} +[A-Z]", page, re.MULTILINE)


@pytest.mark.parametrize("command", ["ls", "verify", "export", "import", "prune"])
def test_help_of_a_command_imports_no_torch(command: str) -> None:
    code = (
        f"import sys; from lite.cli import main; main(['reference', {command!r}, '--help']); "
        "heavy = {'torch', 'transformers', 'numpy', 'peft', 'pyarrow'} & sys.modules.keys(); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: lite reference {command}")


def test_an_identity_that_only_its_rows_remember(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(cache, "DELETE FROM identities WHERE key = ?", OLD.key)
    assert re.search(r"3 +5.9 KiB +– +of an unknown model", said(cache, "ls", capsys=capsys))
    found = json.loads(said(cache, "ls", "--json", capsys=capsys))["identities"][1]
    assert (found["key"], found["model"], found["last_used"]) == (OLD.key.hex(), None, None)


def test_a_long_name_is_folded_and_not_cut(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "/models/" + "very-" * 20 + "long"
    with Store.open(cache) as store:
        store.put(replace(OLD, weights="33" * 16, model=name), [Row(completion_key([1], [1]), torch.zeros(1))])
    assert name in said(cache, "ls", capsys=capsys).replace("\n", "").replace(" ", "")


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (9 * 2**30, "9.0 GiB"),
        (2**41, "2048.0 GiB"),
    ],
)
def test_sizes(size_bytes: int, words: str) -> None:
    assert size(size_bytes) == words
