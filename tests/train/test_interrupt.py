"""One signal asks, the second acts; outside a run nothing is changed."""

import os
import signal
import threading

import pytest

from lite.train import interrupt


def test_once_asks_and_twice_stops_now() -> None:
    usual = signal.getsignal(signal.SIGINT)
    request = interrupt.Request()
    with interrupt.listening(request):
        os.kill(os.getpid(), signal.SIGINT)
        assert request.asked
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
