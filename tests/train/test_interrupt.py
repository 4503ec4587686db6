"""One signal asks, the second acts; outside a run nothing is changed."""

import os
import signal
import threading
from pathlib import Path

import pytest

from lite.train import interrupt


def test_once_asks_and_twice_stops_now() -> None:
    usual = signal.getsignal(signal.SIGINT)
    heard: list[str] = []
    request = interrupt.Request(lambda: heard.append("once"))
    with interrupt.listening(request):
        os.kill(os.getpid(), signal.SIGINT)
        assert request.asked
        assert heard == ["once"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is usual


def test_sigterm_asks_too_and_handlers_come_back() -> None:
    usual = [signal.getsignal(number) for number in interrupt.SIGNALS]
    request = interrupt.Request()
    with interrupt.listening(request):
        assert [signal.getsignal(number) for number in interrupt.SIGNALS] != usual
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.asked
        assert [signal.getsignal(number) for number in interrupt.SIGNALS] == usual
    request = interrupt.Request()
    with interrupt.listening(request):
        pass
    assert not request.asked
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == usual


def test_the_command_is_one_that_a_shell_takes() -> None:
    stopped = interrupt.Interrupted(Path("my runs/1"), 3)
    assert str(stopped) == "Stopped after step 3. To go on: lite resume 'my runs/1'"


def test_another_thread_installs_nothing() -> None:
    seen = []

    def work() -> None:
        with interrupt.listening(interrupt.Request()):
            seen.append([signal.getsignal(number) for number in interrupt.SIGNALS])

    usual = [signal.getsignal(number) for number in interrupt.SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [usual]
