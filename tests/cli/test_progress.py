"""What is on stderr while it trains: plain lines without a terminal, a bar with one."""

import io
import logging
import os
import time

import pytest
from rich.console import Console

from lite.cli.console import console
from lite.cli.progress import Shown, duration, figures, shown

STEP = {"loss": 0.5, "rewards/margins": 0.1, "rewards/accuracies": 0.75, "seconds": 2.0, "tokens_per_second": 1234.0}


def told(*, bar: bool, width: int = 80) -> str:
    """Everything that a run of three steps writes."""
    stream = io.StringIO()
    progress = Shown(Console(file=stream, force_terminal=bar, width=width, highlight=False, color_system=None), bar=bar)
    progress.stage("loading")
    progress.steps(3, 0)
    for step in (1, 2, 3):
        progress.step(step, STEP | {"memory_bytes": 2**30})
    progress.evaluation("after", {"eval_loss": 0.25, "eval_rewards/accuracies": 1.0})
    progress.close()
    return stream.getvalue()


def test_lines_without_a_terminal() -> None:
    """The first step, then one every few seconds, and the last; never a control character or a wrapped line."""
    text = told(bar=False, width=40)
    assert text.splitlines() == [
        "loading …",
        "training: step 1 to 3 …",
        "step 1/3  loss 0.5000  margin 0.100  accuracy 75%  1,234 tokens/s  1.00 GiB  4 s left",
        "step 3/3  loss 0.5000  margin 0.100  accuracy 75%  1,234 tokens/s  1.00 GiB  done",
        "held-out, after: loss 0.2500, accuracy 100%",
    ]
    assert all(character.isprintable() or character == "\n" for character in text)


def test_a_bar_on_a_terminal() -> None:
    text = told(bar=True)
    assert "3/3" in text
    assert "loss 0.5000  margin 0.100  accuracy 75%  1,234 tokens/s  1.00 GiB" in text
    assert text.rindex("held-out, after") > text.rindex("3/3")


def test_a_signal_is_answered_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Before the step ends: on a terminal in the bar's line, elsewhere as a line."""
    progress = Shown(Console(file=io.StringIO()), bar=False)
    progress.steps(3, 0)
    progress.stopping()
    assert capfd.readouterr().err == "stopping at the end of this step; the same again stops at once\n"
    stream = io.StringIO()
    progress = Shown(Console(file=stream, force_terminal=True, width=80, color_system=None), bar=True)
    progress.steps(3, 0)
    progress.stopping()
    progress.close()
    assert "stopping at the end of this step" in stream.getvalue()


def test_a_run_outlives_who_watches_it() -> None:
    """`lite orpo 2>&1 | head -1`: rich would end the process."""
    reader, writer = os.pipe()
    os.close(reader)
    watched = console()
    watched.file = os.fdopen(writer, "w")
    watched.print("nobody reads this")
    watched.print("nor this")
    watched.file.close()


def test_a_loss_without_rewards_has_no_such_figures() -> None:
    assert figures({"loss": 1.0, "grad_norm": 3.0}) == ["loss 1.0000"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_lites_log_is_shown_while_it_trains_and_only_then(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("lite.somewhere")
    with shown():
        log.info("loaded [bold] model")
        log.warning("legal and probably wrong")
    log.info("afterwards")
    assert capsys.readouterr().err == "loaded [bold] model\nwarning: legal and probably wrong\n"


def test_lines_are_some_seconds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one second: five of them pass between two lines."""
    clock = iter(range(100, 200))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    progress = Shown(Console(file=stream, width=200), bar=False)
    progress.steps(12, 0)
    for step in range(1, 13):
        progress.step(step, STEP)
    assert [line.split()[1] for line in stream.getvalue().splitlines()[1:]] == ["1/12", "6/12", "11/12", "12/12"]
