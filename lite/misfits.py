"""What no single setting of a recipe can tell: losses and keys that do not exist, settings that exclude each other."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from lite import signatures, sizes, spellings
from lite.errors import RecipeError


class Problem(NamedTuple):
    """Why a setting cannot be used: `key` as it was written, and the rest of the line."""

    key: str
    text: str


def misfits(values: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> list[Problem]:
    """What no single field can tell: a loss or a key that does not exist, and settings that exclude each other."""
    found = []
    if values.get("load_in_4bit") is True and values.get("load_in_8bit") is True:
        found.append(
            Problem("load_in_4bit", " = True beside load_in_8bit = True: a base is quantised once. Take one of them.")
        )
    if values.get("lr_scheduler_type") == "constant" and values.get("warmup_ratio"):
        text = f" = {values['warmup_ratio']!r}: the constant schedule has no warm-up. Take constant_with_warmup."
        found.append(Problem("warmup_ratio", text))
    found += _of_memory(values)
    if values.get("ref") is None:
        for key in ("ref_adapter", "ref_load_in_4bit"):
            if values.get(key):
                found.append(
                    Problem(key, f" = {values[key]!r} without ref: it is a setting of another model. Give --ref.")
                )
    if values.get("adapter") and values.get("run"):
        found.append(Problem("adapter", " beside run: both name an adapter to go on from. Take one of them."))
    method, losses = values.get("method", fields["method"].default), values.get("loss")
    if not isinstance(method, str) or not isinstance(losses, str | None):
        return found
    try:
        signature = signatures.find(method, losses)
    except RecipeError as error:
        key = "loss" if str(error).startswith("loss") else "method"
        return [*found, Problem(key, str(error).removeprefix(key))]
    hyperparameters = signature.hyperparameters
    found += _of_reference(signature, values, fields)
    for key in hyperparameters.keys() & fields.keys():
        found.append(Problem(key, f": a setting of every run, so {method} cannot have a hyperparameter of this name."))
    for key in values.keys() - fields.keys():
        if key not in hyperparameters:
            found.append(Problem(key, _unknown(key, signature, fields)))
        elif problem := hyperparameters[key].problem(values[key]):
            found.append(Problem(key, problem.removeprefix(key)))
    for key, (other, value) in signature.only_when.items():
        default = hyperparameters[key].default
        if values.get(key, default) != default and values.get(other, hyperparameters[other].default) != value:
            text = f" = {values[key]!r} counts only with {other} = {value}. Set that, or leave it out."
            found.append(Problem(key, text))
    return sorted(found)


# Levers that only recomputed layers have, and what each of them needs.
OF_RECOMPUTED = {
    "keep_attention": "keeps what attention gave for the layer's second forward",
    "offload_checkpoints": "moves the inputs of recomputed layers",
    "layers_on_host": "takes a layer's weights away before its backward",
}


WITHOUT_KEEPING = ("flash", "eager", "padded")  # implementations of attention whose result is not kept


def _of_memory(values: Mapping[str, Any]) -> list[Problem]:
    """A card that is no size, and levers without the recomputed layers that they work on."""
    found = []
    vram, recomputed, on_host = (values.get(key) for key in ("vram", "recompute_layers", "layers_on_host"))
    if isinstance(vram, str) and sizes.size_bytes(vram) is None:
        found.append(Problem("vram", f" = {vram!r}: expected {sizes.EXPECTED}."))
    if recomputed == 0:
        for key, why in OF_RECOMPUTED.items():
            if values.get(key):
                text = f" = {values[key]!r} beside recompute_layers = 0: it {why}. Leave one of them out."
                found.append(Problem(key, text))
    attention = values.get("attn_implementation")
    if values.get("keep_attention") and attention in WITHOUT_KEEPING:
        text = (
            f" = True beside attn_implementation = {attention}: only lite's own attention can be kept. Leave one out."
        )
        found.append(Problem("keep_attention", text))
    if recomputed != 0 and isinstance(recomputed, int) and isinstance(on_host, int) and on_host > recomputed:
        text = f" = {on_host} beside recompute_layers = {recomputed}: a layer on the host must be recomputed."
        found.append(Problem("layers_on_host", text))
    return found


def _of_reference(
    signature: signatures.Signature, values: Mapping[str, Any], fields: Mapping[str, FieldInfo]
) -> list[Problem]:
    """Settings of the reference that the loss, or another of them, leaves without meaning."""
    keys = ("ref", "ref_columns", "refresh_reference", "top_k")
    asked = [key for key in keys if values.get(key, fields[key].default) != fields[key].default]
    if not signature.reference:
        return [Problem(key, f" = {values[key]!r}: {signature.name} has no reference. Leave it out.") for key in asked]
    found = []
    if "top_k" in asked and not signature.soft:
        text = f" = {values['top_k']!r}: {signature.name} does not learn from the reference's words. Leave it out."
        found.append(Problem("top_k", text))
    if signature.soft and not signature.terms and "ref" not in asked:
        found.append(Problem("ref", f": {signature.name} learns from another model, and none is named. Give --ref."))
    if "ref_columns" in asked:
        beside = " beside ref_columns: the data brings its reference. Take one of them."
        found += [Problem(key, f" = {values[key]!r}{beside}") for key in ("ref", "refresh_reference") if key in asked]
        needs = {name for name in signature.data if name.startswith("ref_")}
        if signature.by_token or not needs <= {"ref_chosen", "ref_rejected"}:
            found.append(Problem("ref_columns", f" = True: {signature.name} needs more than the totals of pairs."))
    if "ref" in asked and "refresh_reference" in asked:
        text = " beside ref: the policy would take the place of the model named. Take one of them."
        found.append(Problem("refresh_reference", f" = {values['refresh_reference']!r}{text}"))
    return found


def _unknown(key: str, signature: signatures.Signature, fields: Mapping[str, FieldInfo]) -> str:
    known = [*fields, *signature.hyperparameters]
    method = signature.name
    text = f": no such setting of {method}."
    if ours := spellings.foreign(key, known):
        field = fields.get(ours)
        return f"{text} lite calls it {ours}" + (f": {field.description}" if field else ".")
    if instead := spellings.elsewhere(key):
        return f"{text} {instead}"
    near = spellings.nearest(key, known)
    return text + (f" Did you mean {near}?" if near else f" See `lite {method} --help`.")
