"""Mixtures: which tensor of a file gets which type, the same as llama-quantize chooses.

A file type is a bulk type and exceptions: values, the last matrix of the MLP and the head hurt most when they are
coarse, early and late layers more than those between. Each role below is one table of exceptions, by file type; what a
table does not name keeps the bulk type. Left out: architectures that lite does not write, with rules of their own.

Source: llama_tensor_get_type_impl, tensor_type_fallback and tensor_requires_imatrix in llama.cpp's
src/llama-quant.cpp; tests/gguf/fixtures holds what the program itself chose.
"""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from lite.errors import ExportError, raise_collected
from lite.gguf.types import FILE_TYPES, FileType

# Where the row is no multiple of 256: the type of blocks of 32 with about as many bits, or more.
FALLBACKS = {
    Kind.IQ2_XXS: Kind.IQ4_NL,
    Kind.IQ2_XS: Kind.IQ4_NL,
    Kind.IQ2_S: Kind.IQ4_NL,
    Kind.IQ3_XXS: Kind.IQ4_NL,
    Kind.IQ3_S: Kind.IQ4_NL,
    Kind.IQ4_XS: Kind.IQ4_NL,
    Kind.Q2_K: Kind.Q4_0,
    Kind.Q3_K: Kind.Q4_0,
    Kind.Q4_K: Kind.Q5_0,
    Kind.Q5_K: Kind.Q5_1,
    Kind.Q6_K: Kind.Q8_0,
}
_TWO_BITS = ("iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")

_Exceptions = Mapping[str, Kind | None]  # file type → its type for a role; None: the bulk type


@dataclass(frozen=True)
class Model:
    """What the choice depends on beside a tensor's own name and shape."""

    architecture: str  # as GGUF names it: mistral and mixtral are llama
    layers: int
    heads: int
    kv_heads: int
    experts: int  # 0: no mixture
    tied: bool  # the head is the embedding

    @property
    def values_are_few(self) -> bool:
        """Whether four or more heads share one value head: more bits for it cost little."""
        return self.heads // self.kv_heads >= 4

    @property
    def counts_as_70b(self) -> bool:
        """Whether llama.cpp takes it for a 70B model: it looks at the architecture and the layers, not the size."""
        llama = self.architecture == "llama" and self.heads != self.kv_heads and self.experts != 8
        return self.layers == 80 and (llama or self.architecture == "qwen2")


def tensor_type(name: str, shape: tuple[int, ...], model: Model, file_type: FileType, *, importance: bool) -> Kind:
    """The type of one tensor of a file of `file_type`.

    name as in GGUF (`blk.0.attn_v.weight`); shape rows first, as torch has it; importance: an importance matrix is
    used. Norms, vectors and routers stay F32; in f16, bf16 and f32 files all else has that type, as the converter
    writes it.
    """
    if len(shape) < 2 or not name.endswith("weight") or name.endswith(("_norm.weight", "ffn_gate_inp.weight")):
        return Kind.F32
    if not file_type.quantised:
        return file_type.tensor_type
    if name == "output.weight" or (name == "token_embd.weight" and model.tied):
        return _fitting(_head(file_type, shape[-1]), shape[-1])
    kind = _exceptions(name, model, importance).get(file_type.name) or file_type.tensor_type
    if _is_value(name) and file_type.name not in _TWO_BITS:
        if model.counts_as_70b and kind in (Kind.Q3_K, Kind.Q4_K):
            kind = Kind.Q5_K
        if model.experts == 8:
            kind = Kind.Q8_0
    return _fitting(kind, shape[-1])


def requires_importance(name: str, kind: Kind, file_type: FileType) -> bool:
    """Whether a tensor of this type is garbage without an importance matrix."""
    if name in ("token_embd.weight", "output.weight"):
        return False
    lattices = (Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS)
    return kind in lattices or (kind == Kind.Q2_K and file_type.name == "q2_k_s")


def check_importance(kinds: Mapping[str, Kind], file_type: FileType, weighed: Container[str] | None) -> None:
    """Raise ExportError if a tensor needs an importance matrix and has none.

    kinds: each tensor's name and type; weighed: the names that the importance matrix holds, None without one.
    """
    needy = [name for name, kind in kinds.items() if requires_importance(name, kind, file_type)]
    if needy and weighed is None:
        raise ExportError(
            f"{file_type.name} needs an importance matrix: without one, what it writes for {needy[0]} and "
            f"{len(needy) - 1} more is garbage.\nGive --imatrix, or take a type that needs none, such as q2_k."
        )
    missing = [f"{name}: {kinds[name].name}" for name in needy if weighed is not None and name not in weighed]
    raise_collected(
        ExportError,
        f"{file_type.name} needs an importance matrix, and the one given holds nothing for these tensors:",
        missing,
        "Compute it from the same model, or take a type that needs none, such as q2_k.",
    )


def _is_value(name: str) -> bool:
    return "attn_v.weight" in name or "attn_qkv.weight" in name


def _head(file_type: FileType, columns: int) -> Kind:
    """The type of the head, and of an embedding that serves as one."""
    if columns % GGML_QUANT_SIZES[file_type.tensor_type][0]:
        return Kind.Q8_0
    if file_type.name in (*_TWO_BITS, "iq3_xxs"):
        return Kind.Q5_K
    return Kind.Q8_0 if file_type.tensor_type == Kind.Q8_0 else Kind.Q6_K


def _exceptions(name: str, model: Model, importance: bool) -> _Exceptions:
    """The table of a tensor's role; its layer is the number in its name."""
    if name == "token_embd.weight":
        return _EMBEDDING
    found = re.match(r"blk\.(\d+)\.", name)
    layer = int(found[1]) if found else 0
    if _is_value(name):
        return _values(layer, model, importance)
    if "attn_k.weight" in name:
        return _keys(model)
    if "attn_q.weight" in name:
        return _QUERIES
    if "attn_output.weight" in name:
        return _OUTPUTS_OF_8_EXPERTS if model.experts == 8 else _OUTPUTS
    if "ffn_down" in name:
        return _downs(layer, model, importance)
    if "ffn_up" in name or "ffn_gate" in name:
        middle = model.layers // 8 <= layer < 7 * model.layers // 8
        return {"iq3_xs": Kind.IQ3_XXS if middle else None}
    return {}


def _deserves_more(layer: int, layers: int) -> bool:
    """The first eighth of the layers, the last, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _values(layer: int, model: Model, importance: bool) -> _Exceptions:
    """Of attn_v, and of the fused attn_qkv."""
    more = Kind.Q6_K if _deserves_more(layer, model.layers) else None
    few = model.values_are_few
    few_or_experts = few or model.experts >= 4
    return {
        "q2_k": Kind.Q4_K if few else Kind.Q3_K,
        "q2_k_s": Kind.Q4_K if few else None,
        "q3_k_m": Kind.Q5_K if layer < 2 else Kind.Q4_K,
        "q3_k_l": Kind.Q5_K,
        "q4_k_s": Kind.Q5_K if layer < 4 else None,
        "q4_k_m": more,
        "q5_k_m": more,
        "iq4_nl": Kind.Q5_K if few else None,
        "iq4_xs": Kind.Q5_K if few else None,
        "iq3_m": Kind.Q4_K,
        "iq3_s": Kind.Q4_K if few else None,
        "iq3_xs": Kind.Q4_K if few else None,
        "iq3_xxs": Kind.Q4_K if few else Kind.IQ3_XXS if importance else Kind.IQ3_S,
        "iq2_m": Kind.Q4_K if few_or_experts else Kind.IQ3_S,
        "iq2_s": Kind.Q4_K if few_or_experts else Kind.IQ3_S,
        "iq2_xs": Kind.Q4_K if few_or_experts else Kind.Q2_K,
        "iq2_xxs": Kind.Q4_K if few_or_experts else Kind.Q2_K,
    }


def _downs(layer: int, model: Model, importance: bool) -> _Exceptions:
    """Of ffn_down, an expert's too."""
    first = layer < model.layers // 8
    deserves_more = _deserves_more(layer, model.layers)
    more = Kind.Q6_K if deserves_more else None
    return {
        # Weighed, the first layers' errors grow without an offset; unweighed, they grow with one.
        "q4_0": Kind.Q4_1 if first and importance else None,
        "q5_0": Kind.Q5_1 if first and importance else None,
        "q2_k": Kind.Q3_K,
        "q2_k_s": Kind.Q4_K if first else None,
        "q3_k_m": Kind.Q5_K if layer < model.layers // 16 else Kind.Q4_K,
        "q3_k_l": Kind.Q5_K,
        "q4_k_s": Kind.Q5_K if first else None,
        "q4_k_m": more,
        "q5_k_m": more,
        "iq4_nl": Kind.Q5_K if first and not importance else None,
        "iq4_xs": Kind.Q5_K if first and not importance else None,
        "iq3_m": Kind.Q4_K if first or (model.experts == 8 and deserves_more) else None,
        "iq3_xxs": None if importance else Kind.Q4_K if first else Kind.Q3_K,
        "iq2_m": Kind.IQ3_S if first else None,
        "iq2_s": Kind.IQ3_S if first else None,
        "iq2_xs": Kind.Q2_K if first else None,
        "iq2_xxs": Kind.Q2_K if first else None,
    }


_QUERIES: _Exceptions = {"iq3_xs": Kind.IQ3_XXS, "iq3_xxs": Kind.IQ2_S}
_EMBEDDING: _Exceptions = {
    "iq3_xxs": Kind.IQ3_S,
    "iq2_m": Kind.IQ3_S,
    "iq2_s": Kind.IQ3_S,
    "iq2_xs": Kind.Q2_K,
    "iq2_xxs": Kind.Q2_K,
}
_OUTPUTS: _Exceptions = {
    "q2_k": Kind.Q3_K,
    "q3_k_m": Kind.Q4_K,
    "q3_k_l": Kind.Q5_K,
    "iq3_m": Kind.Q4_K,
    "iq3_xxs": Kind.IQ3_S,
    "iq2_m": Kind.IQ3_S,
    "iq2_s": Kind.IQ3_S,
}
_OUTPUTS_OF_8_EXPERTS: _Exceptions = dict.fromkeys(
    (
        "q2_k",
        "q3_k_s",
        "q3_k_m",
        "q4_k_s",
        "q4_k_m",
        "iq4_nl",
        "iq4_xs",
        "iq3_m",
        "iq3_s",
        "iq3_xs",
        "iq3_xxs",
        *_TWO_BITS,
    ),
    Kind.Q5_K,
)


def _keys(model: Model) -> _Exceptions:
    """Of attn_k. Eight experts are Mixtral, whose attention is small beside them."""
    if model.experts != 8:
        return _QUERIES
    return dict.fromkeys(FILE_TYPES, Kind.Q8_0) | dict.fromkeys(_TWO_BITS, Kind.Q4_K)


def _fitting(kind: Kind, columns: int) -> Kind:
    """`kind`, or what takes its place where its blocks do not fill a row."""
    if columns % GGML_QUANT_SIZES[kind][0]:
        kind = FALLBACKS.get(kind, kind)
    return Kind.F16 if columns % GGML_QUANT_SIZES[kind][0] else kind
