"""The clock gives every moment of a step to one phase."""

import math
import time

import pytest
import torch

from lite.memory import marks
from lite.profile.clock import Clock


def test_phases_add_up_and_may_come_again() -> None:
    with Clock(torch.device("cpu")) as clock, marks.watching(clock):
        for name, wait_s in (("forward", 0.01), ("backward", 0.02), ("forward", 0.01), ("idle", 0.0)):
            marks.phase(name)
            time.sleep(wait_s)
    marks.phase("after")  # nobody listens any more
    assert list(clock.seconds) == ["forward", "backward", "idle"]
    assert math.isclose(sum(clock.seconds.values()), clock.total_s, rel_tol=1e-9)
    assert clock.seconds["forward"] >= 0.02
    assert clock.seconds["idle"] < 0.01


def test_a_second_use_forgets_the_first() -> None:
    clock = Clock(torch.device("cpu"))
    for name in ("one", "two"):
        with clock, marks.watching(clock):
            marks.phase(name)
    assert list(clock.seconds) == ["two"]


@pytest.mark.gpu
def test_on_a_card_it_is_the_cards_time() -> None:
    """The host is through at once; what it queued takes the time."""
    product = torch.randn(4096, 4096, device="cuda")
    with Clock(torch.device("cuda")) as clock, marks.watching(clock):
        marks.phase("forward")
        for _ in range(50):
            product = product @ product
        marks.phase("idle")
    assert clock.seconds["forward"] > 0.9 * clock.total_s
    assert clock.total_s > 1e-3
