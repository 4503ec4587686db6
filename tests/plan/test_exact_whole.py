"""Where whole weights are trained: a dry run is the real step to the byte, and no full gradient is ever there."""

import pytest

from lite.memory.levers import Levers
from lite.model import matrices
from lite.plan.dry_run import Account
from lite.plan.lengths import Lengths, Row
from tests.plan.conftest import ROW, ROWS, bare, metered, real, recipe_of

GALORE = {"galore": True, "galore_rank": 16}
LATE = {"galore_update_interval": 9, "galore_sketch_steps": 3, "galore_merge": "refresh"}
SETTINGS = {
    "fp32": {**GALORE, "galore_states": "float32"},
    "bf16": {**GALORE, "dtype": "bfloat16"},
    "int8": {**GALORE, "dtype": "bfloat16", "int8_weights": True},
    "merged at refreshes": {**GALORE, **LATE, "int8_weights": True},
    "embeddings": {**GALORE, **LATE, "dtype": "bfloat16", "train_embeddings": True},
    "svd": {**GALORE, "galore_projection": "svd"},
    "at random": {**GALORE, "galore_projection": "random", "max_grad_norm": 0.0},
    "small matrices": {"galore": True, "galore_rank": 64},
    "adamw": {"full": True},
    "adamw-8bit": {"full": True, "optimizer": "adamw-8bit", "train_embeddings": True},
    "galore-torch": {"full": True, "optimizer": "galore-torch", "galore_rank": 16},
}
SHORT = Row(4, (5, 4))
FEW = Lengths(SHORT, None, SHORT.tokens, SHORT.tokens, SHORT)


PHASES = ("transfers", "forward", "head", "backward")
INSIDE = 128 * 1024  # bytes: what a CPU makes in the update where a GPU has one kernel, to quantise states and to round


def assert_same(meta: Account, cpu: Account) -> None:
    """Peaks and what they are made of, to the byte but in the update; before it, where nothing is drawn, each operator.

    On meta no number is drawn, and bitsandbytes quantises on a CPU by many operators.
    """
    assert {phase: meta.peaks[phase] for phase in PHASES} == {phase: cpu.peaks[phase] for phase in PHASES}
    assert (meta.top, meta.at_top, meta.phase_at_top) == (cpu.top, cpu.at_top, cpu.phase_at_top)
    assert +meta.static == +cpu.static
    assert 0 <= cpu.peaks["update"] - meta.peaks["update"] < INSIDE
    drawn = {"aten::normal_"}
    traces = [[one for one in meter.trace if one[0] not in drawn] for meter in (meta, cpu)]
    before = min(len(trace) for trace in traces) // 2
    assert before > 200
    assert traces[0][:before] == traces[1][:before]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_live_bytes_are_those_of_a_real_step(written, settings: dict) -> None:
    recipe, levers = recipe_of(written("qwen3", 2), **settings), Levers(1, mlp_tile_tokens=32)
    assert_same(*(metered(made(recipe, levers), recipe, later=True) for made in (bare, real)))


@pytest.mark.parametrize("tied", ["llama", "gemma3"])
def test_of_tied_embeddings(written, tied: str) -> None:
    """And of a step of one pack, in which everything arises."""
    recipe = recipe_of(written(tied, 2), **GALORE, train_embeddings=True, method="dpo")
    assert_same(*(metered(made(recipe, Levers(1)), recipe) for made in (bare, real)))


@pytest.mark.parametrize("name", ["bf16", "merged at refreshes", "embeddings", "adamw"])
def test_the_second_pack_of_a_step_is_what_is_planned(written, name: str) -> None:
    """Two packs alike, really one after the other; of the first a few bytes a token are left."""
    recipe = recipe_of(written("qwen3", 2), **SETTINGS[name])
    one = Lengths(ROW, None, ROW.tokens, ROW.tokens, ROW)
    planned = metered(bare(recipe, Levers(1)), recipe, one, later=True)
    both = metered(real(recipe, Levers(1)), recipe, ROWS, packs=2)
    assert 0 <= both.top["device"] - planned.top["device"] < 100 * ROW.tokens
    alone = metered(bare(recipe, Levers(1)), recipe, one)
    assert both.top["device"] - alone.top["device"] > 50_000  # a first pack takes less


@pytest.mark.parametrize("name", ["fp32", "int8", "embeddings", "adamw"])
def test_no_gradient_of_a_matrix_is_ever_made(written, name: str) -> None:
    """In a pack so short that whatever has its tokens is smaller than any matrix; AdamW's are seen by the same meter.

    fp32, r = 16: the largest that backward makes is PᵀG of the longest matrix, or a sketch with 8 columns more.
    """
    recipe = recipe_of(written("qwen3", 2), **SETTINGS[name])
    model = bare(recipe, Levers(1))
    found = matrices.matrices(model)
    assert ({"lm_head", "model.embed_tokens"} <= found.keys()) == (name == "embeddings")
    largest = metered(model, recipe, FEW).largest["backward"]
    if name == "adamw":
        assert largest == 4 * 128 * 256
        return
    most = max(4 * (16 + 8) * matrix.long for matrix in found.values())
    assert largest <= most < 4 * 128 * 256 / 4


def test_what_a_step_takes_beside_full_adamw(written) -> None:
    """fp32, N weights in matrices: AdamW keeps 2 N numbers and gathers N, GaLore of each r n, twice and once, and P.

    What is left of the peak: activations, and of AdamW one layer's gradient at a time.
    """
    galore, adamw = (recipe_of(written("qwen3"), **SETTINGS[name]) for name in ("fp32", "adamw"))
    found = list(matrices.matrices(model := bare(galore, Levers(3))).values())
    ours = metered(model, galore, FEW, later=True)
    theirs = metered(bare(adamw, Levers(3)), adamw, FEW, later=True)
    weights = sum(matrix.weight.nbytes for matrix in found)
    low_rank = sum(4 * 16 * matrix.long for matrix in found)
    assert ours.static["weights"] == theirs.static["weights"]
    counters = 4 * sum(1 for parameter in model.parameters() if parameter.requires_grad)  # of AdamW's steps
    assert ours.static["optimizer"] - 2 * low_rank == theirs.static["optimizer"] - 2 * weights - counters
    assert ours.static["projections"] == sum(4 * 16 * matrix.short for matrix in found)
    sketches = ours.static["gradients"] - low_rank - (theirs.static["gradients"] - weights)
    due = 1 + (len(found) - 1) // 8  # of 21, in step 1
    assert 0 < sketches <= due * max(4 * 24 * (matrix.short + matrix.long) for matrix in found)
    beyond = [meter.top["device"] - sum(meter.static.values()) for meter in (ours, theirs)]
    assert beyond[0] < beyond[1]
