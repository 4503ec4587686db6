"""The meter: live bytes of a few operators, counted by hand."""

import pytest
import torch
from torch import nn

from lite.memory import marks
from lite.memory.meter import Meter, frozen_tensors


@pytest.fixture(params=["meta", "cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def test_live_bytes_by_hand(device: torch.device) -> None:
    """a, b of 40 bytes; a + b makes 40 more; without a 80 are left. The peak was 120."""
    with Meter() as meter:
        a = torch.empty(10, device=device)
        b = torch.empty(10, device=device)
        c = a + b
        assert meter.live["device"] == 120
        del a
        assert meter.live["device"] == 80
    assert (meter.top["device"], meter.live["host"]) == (120, 0)
    del b, c
    assert meter.live["device"] == 0


def test_views_and_what_is_done_in_place_count_once(device: torch.device) -> None:
    """And a view keeps all of its storage alive."""
    with Meter() as meter:
        a = torch.empty(4, 4, device=device)
        view = a.view(16)[:2]
        a.add_(1).mul_(2)
        assert meter.live["device"] == 64
        del a
        assert meter.live["device"] == 64
        del view
        assert meter.live["device"] == 0


def test_a_granule_rounds_up(device: torch.device) -> None:
    """CUDA's allocator gives multiples of 512 bytes: 4 bytes take 512, 516 take 1,024."""
    with Meter(granule=512) as meter:
        one, other = torch.empty(1, device=device), torch.empty(129, device=device)
    assert meter.live["device"] == 512 + 1024
    del one, other


def test_what_is_made_on_the_host_is_the_hosts(device: torch.device) -> None:
    with Meter() as meter:
        with marks.on_host():
            away = torch.empty(100, device=device)
        here = torch.empty(3, device=device)
    assert (meter.live["host"], meter.live["device"]) == (400, 12)
    assert (meter.lies(away), meter.lies(here)) == ("host", "device")
    del away
    assert (meter.live["host"], meter.top["host"]) == (0, 400)


def test_parts_are_of_the_phase_or_of_what_they_are_held_as(device: torch.device) -> None:
    """12 bytes held as weights; 20 made in forward, which become gradients; the peak in backward has all and 8 more."""
    weight = torch.empty(3, device=device)
    with Meter() as meter, marks.watching(meter):
        meter.hold([weight], "weights")
        meter.begin()
        assert meter.static == {"weights": 12}
        marks.phase("forward")
        kept = torch.empty(5, device=device)
        meter.hold([kept], "gradients")
        marks.phase("backward")
        more = torch.empty(2, device=device)
        marks.phase("idle")
    assert +meter.at_top == {"weights": 12, "gradients": 20, "backward": 8}
    assert meter.phase_at_top == "backward"
    assert (meter.peaks["forward"], meter.peaks["backward"]) == (32, 40)
    assert meter.largest == {"forward": 20, "backward": 8}
    del kept, more
    assert +meter.parts == {"weights": 12}


def test_logits_are_known_by_their_words(device: torch.device) -> None:
    with Meter(words=7) as meter, marks.watching(meter):
        marks.phase("head")
        logits, other = torch.empty(2, 7, device=device), torch.empty(2, 6, device=device)
        marks.phase("idle")
    assert (meter.parts["logits"], meter.parts["head"]) == (56, 48)
    del logits, other


def test_what_an_operator_holds_inside_is_in_the_peak_alone() -> None:
    """Flash attention's backward for 9 queries, 2 heads of 8 on 1 of keys, in one run. fp32 d query, the run padded by
    128, heads to 32, and a row sum: 137 · 2 · 33 · 4 bytes; d key and d value of both heads: 2 · 9 · 2 · 8 · 2."""
    from lite.memory.workspace import workspace_bytes

    query, key = torch.empty(9, 2, 8, dtype=torch.bfloat16), torch.empty(9, 1, 8, dtype=torch.bfloat16)
    ends = torch.tensor([0, 9])
    inside = workspace_bytes("aten::_flash_attention_backward", (query, query, key, key, query, query, ends), {})
    assert inside == 137 * 2 * 33 * 4 + 2 * 9 * 2 * 8 * 2
    assert workspace_bytes("aten::mm", (query, key), {}) == 0
    meter = Meter()
    meter.hold([query], "weights")
    meter._touch(inside)
    assert (meter.top["device"], meter.live["device"]) == (query.nbytes + inside, query.nbytes)
    assert meter.at_top["workspace"] == inside


def test_a_trace_has_every_operator() -> None:
    with Meter(trace=True) as meter:
        a = torch.empty(2)
        a = a + 1
        a.relu_()
    assert meter.trace == [("aten::empty.memory_format", 8), ("aten::add.Tensor", 16), ("aten::relu_", 8)]


def test_frozen_tensors_are_weights_buffers_and_scales() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    found = {tuple(t.shape) for t in frozen_tensors(model)}
    assert found == {(3,), ()}
    assert len(frozen_tensors(model)) == 1 + 3  # the bias; running mean, variance and count
