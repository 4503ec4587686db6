"""The timeline's points show the live bytes of every moment, and the peak however few they are."""

import torch

from lite.memory import marks
from lite.profile.timeline import Timeline


def metered() -> Timeline:
    """1,000 bytes held; in `forward` 100, 200, then the 100 are dropped; in `backward` 4,000 for one operator."""
    timeline = Timeline()
    held = torch.zeros(1000, dtype=torch.uint8)
    with marks.watching(timeline), timeline:
        timeline.hold([held], "weights")
        timeline.begin()
        marks.phase("forward")
        one = torch.zeros(100, dtype=torch.uint8)
        two = torch.zeros(200, dtype=torch.uint8)
        del one
        two.add_(1)
        marks.phase("backward")
        three = torch.zeros(4000, dtype=torch.uint8)
        del three
        two.add_(1)
        marks.phase("idle")
    return timeline


def test_each_operator_is_a_point() -> None:
    timeline = metered()
    parts, phases = timeline.thinned()
    assert timeline.operators == 5
    assert parts == {
        "weights": [1000] * 5,
        "forward": [100, 300, 200, 200, 200],
        "backward": [0, 0, 0, 4000, 0],
    }
    assert phases == [(0, "forward"), (3, "backward")]


def test_thinned_the_peak_stays() -> None:
    timeline = metered()
    parts, phases = timeline.thinned(2)
    assert parts == {"weights": [1000] * 2, "forward": [300, 200], "backward": [0, 4000]}
    assert max(map(sum, zip(*parts.values(), strict=True))) == timeline.top["device"] == 5200
    assert phases == [(0, "forward"), (1, "backward")]


def test_of_no_step_there_is_nothing() -> None:
    assert Timeline().thinned() == ({}, [])
