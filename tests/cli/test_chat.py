"""`lite chat` as a user types it: into a pipe, and in a terminal with Ctrl-C."""

import io
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lite.cli import main
from tests import served

LITE = [sys.executable, "-c", "from lite.cli import main; raise SystemExit(main())"]
LIMIT_S = 60
PROMPT_S = 0.5  # after it is shown: Python hears a Ctrl-C that comes before it waits for keys at the next key only
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _piped(arguments: list[str], typed: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return main(["chat", *arguments])


def test_every_line_of_a_pipe_is_answered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    typed = f"{served.QUESTION}\n\n/system Be kind.\n{served.QUESTION}\n/exit\nnever asked\n"
    assert _piped([str(served.gguf()), "--temperature", "0"], typed, monkeypatch) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert "Paris" in out.splitlines()[0]
    assert err == "a new conversation, with this system prompt\n"


def test_a_model_without_a_template_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = "/system Be kind.\nOnce upon a time\n"
    assert _piped([str(served.plain()[1]), "--temperature", "0", "--max-tokens", "4"], typed, monkeypatch) == 0
    assert capsys.readouterr().err == (
        "no chat template: what is said goes to the model as plain text, one after the other\n"
        "a new conversation, with this system prompt as text before it: the model has no chat template\n"
    )


def test_a_byte_that_is_no_text_is_one_unknown_character(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = "What is the capital of \xe9\nWhat is 2 and 2?\n".encode("latin-1")
    for errors in ("strict", "surrogateescape"):  # as Python opens stdin in a locale of UTF-8, and in C's
        stdin = io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8", errors=errors)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["chat", str(served.gguf()), "--temperature", "0", "--max-tokens", "8"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2


def test_base_and_tuned_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    arguments = [str(served.adapter()), "--compare", "--temperature", "0", "--max-tokens", "8", "--device", "cpu"]
    assert _piped(arguments, f"{served.QUESTION}\n", monkeypatch) == 0
    base, tuned = capsys.readouterr().out.splitlines()[:2]
    assert base.startswith("base: ")
    assert tuned.startswith("tuned: ")
    assert base.removeprefix("base: ") != tuned.removeprefix("tuned: ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["GGUF", "--compare"], "--compare: .* has no adapter to switch off. Name the run"),
        (["GGUF", "--dtype", "float32"], "--dtype: a GGUF file is computed as it is"),
        (["GGUF", "--temperature", "-1", "--top-p", "2"], r"(?s)--temperature = -1\.0: .*--top-p = 2\.0: expected a"),
        (["GGUF", "--max-token", "5"], "--max-token: no such option. Did you mean --max-tokens?"),
        ([str(Path(__file__).parent)], "neither a run, an adapter nor a model is there|is not there"),
        (["nowhere.gguf", "--context", "128"], "--context: it is of a GGUF file, and this is none"),
    ],
)
def test_what_cannot_be_is_told(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    typed = [str(served.gguf()) if word == "GGUF" else word for word in arguments]
    assert _piped(typed, "hello\n", monkeypatch) == 2
    out, err = capsys.readouterr()
    assert re.search(told, err), err
    assert out == ""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_ctrl_c_ends_an_answer_and_twice_leaves() -> None:
    with _Terminal([str(served.gguf()), "--temperature", "3", "--top-p", "1", "--max-tokens", "3500"]) as terminal:
        for _ in range(10):  # what is said at random may end before it can be stopped
            terminal.until("> ")
            terminal.type("Tell me everything\n")
            terminal.until("everything\r\n")
            terminal.any()
            terminal.type("\x03")
            if "(stopped; " in terminal.until("once more leaves"):
                break
        else:
            pytest.fail("no answer was stopped")
        terminal.until("> ")
        terminal.type("/help\n")
        terminal.until("/system TEXT")
        terminal.until("> ")
        time.sleep(PROMPT_S)
        terminal.type("\x03")
        terminal.until("Ctrl-C once more leaves.")
        terminal.until("> ")
        time.sleep(PROMPT_S)
        terminal.type("\x03")
        assert terminal.process.wait(timeout=30) == 130


class _Terminal:
    """A `lite chat` in a terminal of its own."""

    def __init__(self, arguments: list[str]) -> None:
        import pty

        self._ours, theirs = pty.openpty()
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        # A session of its own, whose terminal this is: then ^C is a signal.
        self.process = subprocess.Popen(
            [*LITE, "chat", *arguments], **streams, start_new_session=True, preexec_fn=_own_terminal
        )
        os.close(theirs)
        self._unread = ""

    def __enter__(self) -> "_Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, text: str) -> None:
        """As fingers would."""
        os.write(self._ours, text.encode())

    def until(self, text: str) -> str:
        """What it shows from where the last one ended to the end of `text`."""
        ends = time.monotonic() + LIMIT_S
        while text not in self._unread:
            assert time.monotonic() < ends, f"{text!r} never came; the terminal shows {self._unread!r}"
            self._read()
        seen, found, self._unread = self._unread.partition(text)
        return seen + found

    def any(self) -> None:
        """Wait until it shows anything more."""
        ends = time.monotonic() + LIMIT_S
        while not self._unread:
            assert time.monotonic() < ends
            self._read()

    def _read(self) -> None:
        if select.select([self._ours], [], [], 1)[0]:
            self._unread += ESCAPES.sub("", os.read(self._ours, 4096).decode(errors="replace"))


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
