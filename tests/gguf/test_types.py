"""File types: what people type, and what the file says."""

import gguf
import pytest

from lite.errors import ExportError
from lite.gguf.types import ALIASES, FILE_TYPES, file_type, file_types


@pytest.mark.parametrize("name", FILE_TYPES)
def test_numbers_are_those_of_the_format(name: str) -> None:
    """gguf names the same number the same, but for ALL_ and MOSTLY_."""
    known = gguf.LlamaFileType(FILE_TYPES[name].value).name
    assert known.removeprefix("ALL_").removeprefix("MOSTLY_").lower() == name


def test_no_number_is_twice() -> None:
    assert len({kind.value for kind in FILE_TYPES.values()}) == len(FILE_TYPES)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *[("Q4_K_M", "q4_k_m"), ("q4-k-m", "q4_k_m"), (" q8_0 ", "q8_0"), ("BF16", "bf16"), ("q4_k", "q4_k_m")],
        *[("Q3_K", "q3_k_m"), ("q5-K", "q5_k_m"), ("q2_k", "q2_k"), ("q6_k", "q6_k")],
    ],
)
def test_what_people_type(text: str, name: str) -> None:
    assert file_type(text).name == name
    assert all(full in FILE_TYPES for full in ALIASES.values())


def test_an_unknown_type_names_the_nearest_and_the_list() -> None:
    with pytest.raises(ExportError, match=r"'q4_km'\. Did you mean q4_k_m\?\nKnown: f32, f16, .*iq2_xxs\."):
        file_type("q4_km")
    with pytest.raises(ExportError, match=r"'7'\.\nKnown"):
        file_type("7")


def test_lists() -> None:
    assert [kind.name for kind in file_types("q4_k_m, Q8_0,")] == ["q4_k_m", "q8_0"]
    with pytest.raises(ExportError, match=r"named twice in 'q4_k,q8_0,q4_k_m': q4_k_m"):
        file_types("q4_k,q8_0,q4_k_m")
    with pytest.raises(ExportError, match="No GGUF file type is named"):
        file_types(" , ")
