"""Quantiser: the bytes of gguf where it can write a type, of llama-quantize (record_llama_quantize.py) for the rest."""

import gzip
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from lite.errors import ExportError
from lite.gguf import quantise as room
from lite.gguf.quantise import NEEDS_IMPORTANCE, Quantiser, RowError, dequantise, row_bytes
from lite.gguf.types import FILE_TYPES
from tests.gguf.record_llama_quantize import SMALL, arithmetic_rows, small_matrices, weighed

FIXTURE = Path(__file__).parent / "fixtures" / "llama_quantize.json.gz"
WRITTEN = json.loads(gzip.decompress(FIXTURE.read_bytes()))["written"]
BOTH = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
KINDS = list(dict.fromkeys(file_type.tensor_type for file_type in FILE_TYPES.values()))


# ggml builds the lattice of these for up to twenty seconds; IQ2_XXS, which goes the same way, takes three.
LEFT_OUT = {"IQ2_S", "IQ2_XS"}
CASES = [
    f"{small} {key}"
    for small in SMALL
    for key, made in WRITTEN[small].items()
    if LEFT_OUT.isdisjoint(entry.split()[0] for entry in made.values())
]


@pytest.fixture(scope="module")
def one() -> Iterator[Quantiser]:
    with Quantiser(1) as quantiser:
        yield quantiser


@pytest.fixture(scope="module")
def bell() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((8, 512), dtype=np.float32)


def hard_rows() -> np.ndarray:
    """(n, 256) float32: what a quantiser may get wrong."""
    halves = np.arange(-128, 128, dtype=np.float32)
    rng = np.random.default_rng(1)
    rows = [
        np.zeros(256),
        -np.zeros(256),
        halves + 0.5,  # ties of every step
        halves * 0.5,
        np.full(256, 65504.0),
        np.where(halves % 2 == 0, 65504.0, -65504.0),
        np.full(256, 65519.0),  # rounds down to the largest half
        np.full(256, 1e-40),  # denormal in float32
        halves * 2.0**-24,  # denormal in float16
        halves * 2.0**-25,  # ties of those
        1 + halves * 2.0**-11,  # ties of float16 near 1
        1 + halves * 2.0**-8,  # ties of bfloat16 near 1
        np.eye(1, 256, 77)[0] * -3.0,  # one outlier, negative
        *(rng.standard_normal((6, 256)) * 10.0 ** np.arange(-6, 6, 2)[:, None]),
        rng.integers(-8, 8, 256) / 8,
    ]
    return np.array(rows, np.float32)


@pytest.mark.parametrize("kind", BOTH, ids=lambda kind: kind.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of gguf, whose 1 / scale of a denormal is infinite
def test_bytes_are_those_of_gguf(one: Quantiser, kind: Kind) -> None:
    """But for rows of -0.0, whose scale is 0.0 there and -0.0 in llama.cpp, in Q4_0 and Q5_0."""
    rows = np.minimum(hard_rows(), 65504) + (0.0 if kind in (Kind.Q4_0, Kind.Q5_0) else -0.0)
    truth = quants.quantize(rows, kind).view(np.uint8)
    assert np.array_equal(one.quantise(rows, kind), truth)


def test_halves_are_rounded_as_torch_rounds(one: Quantiser) -> None:
    """To the nearest, ties to even, denormals kept."""
    rows = hard_rows()
    for kind, dtype in ((Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)):
        truth = torch.from_numpy(rows).to(dtype).view(torch.uint8).numpy()
        assert np.array_equal(one.quantise(rows, kind), truth)


@pytest.mark.parametrize(
    "case",
    CASES,
)
def test_bytes_are_those_of_llama_quantize(one: Quantiser, case: str) -> None:
    """Of every matrix of small F32 models, with an importance matrix and without; each expert has its own columns."""
    small, _, key = case.partition(" ")
    matrices = small_matrices(SMALL[small])
    assert set(WRITTEN[small][key]) == set(matrices)
    for name, shape in matrices.items():
        kind, truth = WRITTEN[small][key][name].split()
        rows = arithmetic_rows(name, math.prod(shape[:-1]), shape[-1]).reshape(-1, *shape[-2:])  # (E, rows, columns)
        weights = list(weighed(shape)) if key.endswith(" imatrix") and name.startswith("blk.") else [None] * len(rows)
        ours = b"".join(
            one.quantise(part, Kind[kind], weight).tobytes() for part, weight in zip(rows, weights, strict=True)
        )
        assert hashlib.sha256(ours).hexdigest() == truth, f"{name} as {kind}"


@pytest.mark.parametrize("name", sorted({kind.name for kind in KINDS} - LEFT_OUT))
def test_threads_change_no_byte(one: Quantiser, bell: np.ndarray, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, importance = Kind[name], np.square(bell).mean(0)
    whole = one.quantise(bell, kind, importance)
    assert whole.dtype == np.uint8
    assert whole.shape == (8, row_bytes(kind, 512))
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", 3 * 512)
    with Quantiser(2) as two:
        assert np.array_equal(two.quantise(bell, kind, importance), whole)


# By family, from fine to coarse: the root mean square error of a bell curve of width 1, rounded up.
FAMILIES = {
    "Q8_0 with offset": "F32 0, F16 3e-4, BF16 2e-3, Q8_0 0.006, Q5_1 0.04, Q4_1 0.083",
    "Q8_0 without": "Q8_0 0.006, Q5_0 0.045, Q4_0 0.09",
    "K": "Q8_0 0.006, Q6_K 0.019, Q5_K 0.038, Q4_K 0.075, Q3_K 0.16, Q2_K 0.31",
    "IQ": "Q5_K 0.038, IQ4_NL 0.08, IQ4_XS 0.081, IQ3_S 0.18, IQ3_XXS 0.23",
    "IQ of two bits": "IQ3_XXS 0.23, IQ2_XXS 0.36",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_more_bits_are_a_smaller_error(one: Quantiser, bell: np.ndarray, family: str) -> None:
    even, finer = np.ones(512, np.float32), 0.0
    for name, bound in (entry.split() for entry in FAMILIES[family].split(", ")):
        kind = Kind[name]
        blocks = one.quantise(bell, kind, even if kind in NEEDS_IMPORTANCE else None)
        error = math.sqrt(np.square(dequantise(blocks, kind, 512) - bell).mean())
        assert finer <= error <= float(bound), name
        finer = error


def test_every_type_has_its_error_bounded() -> None:
    bounded = {entry.split()[0] for text in FAMILIES.values() for entry in text.split(", ")}
    assert bounded | LEFT_OUT == {kind.name for kind in KINDS}


def test_importance_moves_the_error_to_where_it_matters_less(one: Quantiser, bell: np.ndarray) -> None:
    importance = np.where(np.arange(512) % 32 < 8, 100, 1).astype(np.float32)
    for kind in (Kind.Q4_K, Kind.Q4_0, Kind.IQ4_NL, Kind.Q2_K):
        plain, weighed_ = (
            (np.square(dequantise(one.quantise(bell, kind, weights), kind, 512) - bell) * importance).mean()
            for weights in (None, importance)
        )
        assert weighed_ < plain


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_row_of_what_is_not_finite_is_named(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", 4 * 256)
    rows = np.ones((40, 256), np.float32)
    rows[[33, 37], 5] = value
    for kind in (Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_K):
        with Quantiser(2) as two, pytest.raises(RowError, match="row 33 holds NaN or infinity") as caught:
            two.quantise(rows, kind)
        assert caught.value.row == 33


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_K, Kind.Q6_K], ids=lambda kind: kind.name)
def test_what_a_type_cannot_hold_is_refused(one: Quantiser, kind: Kind, capfd: pytest.CaptureFixture[str]) -> None:
    """Halves, and the scales of blocks, which are halves, end at 65,504."""
    rows = np.ones((3, 256), np.float32)
    rows[1, 7] = 1e10
    with pytest.raises(RowError, match=f"row 1 holds a number too large for {kind.name}"):
        one.quantise(rows, kind)
    assert np.isfinite(dequantise(one.quantise(rows, Kind.BF16), Kind.BF16, 256)).all()
    rows[1, 7] = 70_000  # a block of whole numbers can hold it, a half cannot
    if kind != Kind.F16:
        held = dequantise(one.quantise(rows, kind), kind, 256)
        assert held[1, 7] == pytest.approx(70_000, rel=0.01)
    assert not capfd.readouterr().err


def test_shapes_that_have_no_form(one: Quantiser) -> None:
    assert row_bytes(Kind.Q4_K, 512) == 288
    assert row_bytes(Kind.F16, 3) == 6
    with pytest.raises(ValueError, match="320 columns are no multiple of Q4_K's block of 256"):
        one.quantise(np.ones((1, 320), np.float32), Kind.Q4_K)
    with pytest.raises(ValueError, match=r"importance of shape \(32,\) for rows of 64 columns"):
        one.quantise(np.ones((1, 64), np.float32), Kind.Q4_0, np.ones(32, np.float32))
    with pytest.raises(ValueError, match="IQ2_XS needs an importance matrix"):
        one.quantise(np.ones((1, 256), np.float32), Kind.IQ2_XS)
    assert one.quantise(np.ones((0, 256), np.float32), Kind.Q4_K).shape == (0, 144)


def test_rows_need_not_be_contiguous(one: Quantiser, bell: np.ndarray) -> None:
    turned = np.ascontiguousarray(bell.T)
    assert np.array_equal(one.quantise(turned.T, Kind.Q6_K), one.quantise(bell, Kind.Q6_K))


def test_without_xllamacpp_what_gguf_writes_is_left(one: Quantiser) -> None:
    """In a process where the package cannot be found: the same bytes, and for the rest how to get it."""
    script = """
import sys, numpy as np
sys.modules["xllamacpp"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "xllamacpp" else find(name, *rest)
from lite.errors import ExportError
from lite.gguf.quantise import Quantiser, RowError
from gguf import GGMLQuantizationType as Kind
rows = np.arange(-128, 128, dtype=np.float32)[None] / 7
with Quantiser(1) as one:
    for kind in (0, 1, 30, 8, 2, 3, 6, 7):
        print(kind, one.quantise(rows, Kind(kind)).tobytes().hex())
    for kind, wrong in ((Kind.Q4_K, rows), (Kind.Q8_0, rows * 1e10), (Kind.F16, rows * 1e10)):
        try:
            one.quantise(wrong, kind)
        except (ExportError, RowError) as error:
            print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *same, missing, scale, half = done.stdout.splitlines()
    rows = np.arange(-128, 128, dtype=np.float32)[None] / 7
    assert same == [f"{int(kind)} {one.quantise(rows, kind).tobytes().hex()}" for kind in BOTH]
    assert missing == "Q4_K is quantised by llama.cpp, which is not here: pip install xllamacpp"
    assert scale == "row 0 holds a number too large for Q8_0"
    assert half == "row 0 holds a number too large for F16"
    assert "Warning" not in done.stderr


def test_the_package_is_not_imported() -> None:
    """Its import takes a second and more, and starts llama.cpp's back ends."""
    script = "import sys, numpy as np; from lite.gguf.quantise import Kind, Quantiser\n"
    script += "Quantiser(1).quantise(np.ones((1, 256), np.float32), Kind.Q4_K)\n"
    script += "print([name for name in ('xllamacpp', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_error_is_one_that_a_caller_can_name() -> None:
    """RowError is a ValueError of its own; what a package lacks is an ExportError."""
    assert issubclass(RowError, ValueError)
    assert not issubclass(RowError, ExportError)
    error = RowError(7, "holds NaN or infinity")
    assert (error.row, error.reason, str(error)) == (7, "holds NaN or infinity", "row 7 holds NaN or infinity")
