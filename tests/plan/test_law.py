"""The law: what two or three layers tell of five is what five layers take."""

from dataclasses import replace

import pytest

from lite.memory.levers import Levers
from lite.plan.law import Affine, between
from lite.plan.trials import Settings
from tests.plan.conftest import trials_of, wide_recipe

TOKENS, LAYERS = 2048, 5
LEVERS = {
    "none": (Levers(), [(1, 4), (3, 2), (5, 0)]),
    "attention kept": (Levers(keep_attention=True), [(3, 2)]),
    "weights kept": (Levers(keep_weights=True), [(3, 2), (5, 0)]),
    "checkpoints on the host": (Levers(offload_checkpoints=True, embedding_on_host=True), [(4, 1)]),
    "tiles": (Levers(mlp_tile_tokens=1024), [(5, 0)]),
}


@pytest.fixture(scope="module")
def trials(shaped):
    return trials_of(wide_recipe(shaped(LAYERS)), 2**40)


def whole(trials, settings: Settings, r: int, on_host: int = 0):
    levers = replace(settings.levers, recompute_layers=r, layers_on_host=on_host)
    return trials.outcome(replace(settings, levers=levers), TOKENS, layers=LAYERS)


def assert_law(law, outcome, r: int, p: int) -> None:
    """Phase by phase to the byte; the parts add up to the peak; seconds to rounding."""
    assert {phase: round(peak) for phase, peak in law.peaks(r, p).items()} == dict(outcome.peaks)
    assert law.peak_bytes(r, p) == outcome.peak_bytes
    assert sum(law.parts_bytes(r, p).values()) == pytest.approx(outcome.peak_bytes, abs=2)
    assert law.host_bytes(r, p) == outcome.host_bytes
    assert law.seconds(r, p) == pytest.approx(outcome.cost.step_seconds(), rel=1e-3)


@pytest.mark.parametrize("name", LEVERS)
def test_few_layers_tell_of_all(trials, name: str) -> None:
    levers, splits = LEVERS[name]
    settings = Settings(TOKENS, 1024, False, levers)
    law = trials.law(settings, TOKENS, kept=splits != [(LAYERS, 0)])
    for r, p in splits:
        assert_law(law, whole(trials, settings, r), r, p)


def test_kept_weights_in_short_packs(shaped) -> None:
    """A step is at its worst in a recomputed layer until several are kept: exact on both sides of that, from r = 2 on.

    At r = 1 that layer is the first, whose q, k and v keep no weights: at most theirs, in bf16, too much is told.
    """
    tokens, layers = 192, 8
    trials = trials_of(wide_recipe(shaped(layers)), 2**40)
    settings = Settings(tokens, 64, False, Levers(keep_weights=True))
    law, worst = trials.law(settings, tokens), set()
    for r in (1, 2, 3, 7):
        levers = replace(settings.levers, recompute_layers=r)
        kept, plain = (
            trials.outcome(replace(settings, levers=replace(levers, keep_weights=keeps)), tokens, layers=layers)
            for keeps in (True, False)
        )
        worst.add(kept.peaks["backward"] > plain.peaks["backward"])
        if r > 1:
            assert_law(law, kept, r, layers - r)
        assert 0 <= law.peak_bytes(r, layers - r) - kept.peak_bytes <= 2 * 1024 * (1024 + 2 * 256)
    assert worst == {False, True}


def test_with_no_layer_recomputed(trials) -> None:
    settings = Settings(TOKENS, 1024)
    outcome = whole(trials, settings, 0)
    assert_law(trials.law(settings, TOKENS, recomputed=False), outcome, 0, LAYERS)
    # A law with recomputed layers counts the input of one that is not there.
    over = trials.law(settings, TOKENS).peak_bytes(0, LAYERS) - outcome.peak_bytes
    assert 0 <= over <= 1.01 * TOKENS * 1024 * 2


def test_with_layers_on_the_host(trials) -> None:
    """All of them by the law of a few; each that need not is its own bytes more on the device, and none on the host."""
    settings = Settings(TOKENS, 1024, False, Levers(layers_on_host=1, offload_checkpoints=True))
    law = trials.law(settings, TOKENS, kept=False)
    assert_law(law, whole(trials, settings, LAYERS, LAYERS), LAYERS, 0)
    stay = law.heavier(2 * trials.static()["layers"] / LAYERS)
    outcome = whole(trials, settings, LAYERS, LAYERS - 2)
    assert stay.peak_bytes(LAYERS, 0) == pytest.approx(outcome.peak_bytes, rel=0.005)
    assert stay.host_bytes(LAYERS, 0) == pytest.approx(outcome.host_bytes, rel=0.005)


def test_the_embedding_on_the_device_by_arithmetic(trials) -> None:
    """A table of 32,000 · 1,024 numbers in bf16; what looks it up takes a few bytes a token elsewhere."""
    away = trials.law(Settings(TOKENS, 1024, False, Levers(embedding_on_host=True)), TOKENS)
    size = trials.static()["embedding"]
    assert size == 32_000 * 1024 * 2
    here = away.heavier(size)
    outcome = whole(trials, Settings(TOKENS, 1024), 3)
    assert here.peak_bytes(3, 2) == pytest.approx(outcome.peak_bytes, abs=64 * TOKENS)
    assert here.host_bytes(3, 2) == pytest.approx(outcome.host_bytes, abs=2 * TOKENS * 1024 * 2)


def test_other_tokens_lie_nearly_on_a_line(trials) -> None:
    settings = Settings(TOKENS, 1024)
    near, truth, far = (trials.law(settings, tokens, kept=False) for tokens in (TOKENS, 2 * TOKENS, 4 * TOKENS))
    middle = between(near, far, 2 * TOKENS)
    assert middle.peak_bytes(LAYERS, 0) == pytest.approx(truth.peak_bytes(LAYERS, 0), rel=0.01)
    # On the way computing overtakes the starting of operators: the line lies above that bend, never below.
    assert 0.999 <= middle.seconds(LAYERS, 0) / truth.seconds(LAYERS, 0) <= 1.06


def test_affine_by_hand() -> None:
    """3 + 2 · 5 + 4 · 7 = 41."""
    assert Affine(3, 5, 7)(2, 4) == 41
