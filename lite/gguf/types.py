"""File types: the names by which people ask for a quantised GGUF, as llama-quantize has them.

A file type names a mixture: most tensors get its bulk type, some get more bits (mixtures.py says which). Its number is
what the file says in `general.file_type`.
"""

from dataclasses import dataclass

from gguf import GGMLQuantizationType as Kind

from lite.errors import ExportError
from lite.spellings import nearest


@dataclass(frozen=True)
class FileType:
    """How a whole GGUF file is quantised."""

    name: str  # as the user types it
    value: int  # llama.cpp's llama_ftype: general.file_type
    tensor_type: Kind  # of the bulk of the tensors
    bits: float  # per weight of Llama-3.1-8B, embeddings and head included
    about: str  # one line for help pages

    @property
    def quantised(self) -> bool:
        """Whether weights are stored in blocks that share a scale."""
        return self.tensor_type not in (Kind.F32, Kind.F16, Kind.BF16)


# Names and numbers: enum llama_ftype of llama.cpp's include/llama.h.
_TYPES = [
    FileType("f32", 0, Kind.F32, 32.0, "every weight in 32 bits"),
    FileType("f16", 1, Kind.F16, 16.0, "matrices in half precision; its largest number is 65,504"),
    FileType("bf16", 32, Kind.BF16, 16.0, "matrices as most models are published"),
    FileType("q8_0", 7, Kind.Q8_0, 8.5, "next to no loss"),
    FileType("q6_k", 18, Kind.Q6_K, 6.56, "very little loss"),
    FileType("q5_k_m", 17, Kind.Q5_K, 5.7, "little loss"),
    FileType("q5_k_s", 16, Kind.Q5_K, 5.57, "q5_k_m without its tensors of six bits"),
    FileType("q5_1", 9, Kind.Q5_1, 6.04, "the older five bits, with an offset"),
    FileType("q5_0", 8, Kind.Q5_0, 5.57, "the older five bits"),
    FileType("q4_k_m", 15, Kind.Q4_K, 4.89, "the usual choice: small, some loss"),
    FileType("q4_k_s", 14, Kind.Q4_K, 4.67, "q4_k_m with fewer tensors of more bits"),
    FileType("q4_1", 3, Kind.Q4_1, 5.1, "the older four bits, with an offset"),
    FileType("q4_0", 2, Kind.Q4_0, 4.64, "the older four bits; fastest on some CPUs"),
    FileType("iq4_nl", 25, Kind.IQ4_NL, 4.68, "four bits on an uneven grid; better with an importance matrix"),
    FileType("iq4_xs", 30, Kind.IQ4_XS, 4.46, "iq4_nl with smaller scales; better with an importance matrix"),
    FileType("q3_k_l", 13, Kind.Q3_K, 4.3, "three bits, the sensitive tensors in five"),
    FileType("q3_k_m", 12, Kind.Q3_K, 4.0, "three bits, the sensitive tensors in four or five"),
    FileType("q3_k_s", 11, Kind.Q3_K, 3.64, "three bits; much loss"),
    FileType("iq3_m", 27, Kind.IQ3_S, 3.76, "three bits on a lattice, the sensitive tensors in four"),
    FileType("iq3_s", 26, Kind.IQ3_S, 3.66, "three bits on a lattice"),
    FileType("iq3_xs", 22, Kind.IQ3_S, 3.5, "iq3_s, its middle layers in fewer; needs an importance matrix"),
    FileType("iq3_xxs", 23, Kind.IQ3_XXS, 3.25, "three bits at their smallest; needs an importance matrix"),
    FileType("q2_k", 10, Kind.Q2_K, 3.16, "two bits, the sensitive tensors in three or four; great loss"),
    FileType("q2_k_s", 21, Kind.Q2_K, 2.97, "q2_k with fewer tensors of more bits; needs an importance matrix"),
    FileType("iq2_m", 29, Kind.IQ2_S, 2.93, "two bits on a lattice; needs an importance matrix"),
    FileType("iq2_s", 28, Kind.IQ2_XS, 2.74, "between iq2_m and iq2_xs; needs an importance matrix"),
    FileType("iq2_xs", 20, Kind.IQ2_XS, 2.59, "two bits, great loss; needs an importance matrix"),
    FileType("iq2_xxs", 19, Kind.IQ2_XXS, 2.38, "two bits at their smallest; needs an importance matrix"),
]
FILE_TYPES: dict[str, FileType] = {kind.name: kind for kind in _TYPES}  # from most bits to fewest, by family
# llama-quantize's own short names.
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}


def file_type(text: str) -> FileType:
    """The file type that `text` names, whatever its case, dashes for underscores.

    Raises ExportError for any other, naming the nearest and the list.
    """
    word = text.strip().lower().replace("-", "_")
    found = FILE_TYPES.get(ALIASES.get(word, word))
    if found is None:
        near = nearest(word, [*FILE_TYPES, *ALIASES])
        meant = f" Did you mean {near}?" if near else ""
        raise ExportError(f"There is no GGUF file type {text.strip()!r}.{meant}\nKnown: {', '.join(FILE_TYPES)}.")
    return found


def file_types(text: str) -> list[FileType]:
    """The file types of a list with commas (`q4_k_m,q8_0`), in its order.

    Raises ExportError for an unknown one, for one named twice and for an empty list.
    """
    words = [word for word in text.split(",") if word.strip()]
    if not words:
        raise ExportError(f"No GGUF file type is named. Known: {', '.join(FILE_TYPES)}.")
    found = [file_type(word) for word in words]
    twice = sorted({kind.name for kind in found if found.count(kind) > 1})
    if twice:
        raise ExportError(f"GGUF file types named twice in {text!r}: {', '.join(twice)}. Name each once.")
    return found
