"""What no single setting of a recipe can tell: losses and keys that do not exist, settings that exclude each other."""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from pydantic.fields import FieldInfo

from lite import hyperparameters, signatures, sizes, spellings
from lite.errors import RecipeError
from lite.settings import STANDS_FOR, Shorthands, expanded


class Problem(NamedTuple):
    """Why a setting cannot be used: `key` as it was written, and the rest of the line."""

    key: str
    text: str


def misfits(values: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> list[Problem]:
    """What no single field can tell: a loss or a key that does not exist, and settings that exclude each other."""
    found = _of_shorthands(values)
    word = next((word for word in STANDS_FOR if values.get(word) is True), "full")
    values = expanded(values)
    found += _of_full_training(values, fields, word)
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
    own = signature.hyperparameters
    found += _of_reference(signature, values, fields)
    for key in own.keys() & {*fields, *STANDS_FOR}:
        found.append(Problem(key, f": a setting of every run, so {method} cannot have a hyperparameter of this name."))
    for key in values.keys() - fields.keys():
        if key not in own:
            found.append(Problem(key, _unknown(key, signature, fields)))
        elif problem := own[key].problem(values[key]):
            found.append(Problem(key, problem.removeprefix(key)))
    for key, (other, value) in signature.only_when.items():
        default = own[key].default
        if values.get(key, default) != default and values.get(other, own[other].default) != value:
            text = f" = {values[key]!r} counts only with {other} = {value}. Set that, or leave it out."
            found.append(Problem(key, text))
    return sorted(found)


def _of_shorthands(values: Mapping[str, Any]) -> list[Problem]:
    """Shorthands that are no switch, or that are beside another value of what they stand for."""
    found = []
    for word in STANDS_FOR.keys() & values.keys():
        given, meaning = values[word], STANDS_FOR[word]
        stands_for = " and ".join(f"{key} = {value}" for key, value in meaning.items())
        if not isinstance(given, bool):
            found.append(Problem(word, f" = {given!r}: expected {hyperparameters.WORDS[bool]}."))
        elif given:
            beside = f" beside {word}, which stands for {stands_for}. Leave one of them out."
            others = (key for key, value in meaning.items() if values.get(key, value) != value)
            found += [Problem(key, f" = {values[key]!r}{beside}") for key in others]
        elif all(values.get(key) == value for key, value in meaning.items()):
            text = f" = False beside {stands_for}, for which it stands. Set one of these otherwise, or leave it out."
            found.append(Problem(word, text))
    return found


OF_GALORE_TORCH = ("galore_rank", "galore_scale", "galore_update_interval")  # of GaLore's settings, what it has too


def _of_full_training(values: Mapping[str, Any], fields: Mapping[str, FieldInfo], word: str) -> list[Problem]:
    """Settings of full training without it, and beside it what an adapter or a frozen base alone can have.

    word: by which full training was asked for.
    """
    asked = {key: value for key, value in values.items() if key in fields and value != fields[key].default}
    full, optimizer = asked.get("full", False), asked.get("optimizer", fields["optimizer"].default)
    if not isinstance(full, bool) or optimizer not in get_args(fields["optimizer"].annotation):
        return []
    of_galore = [key for key in asked if key.startswith("galore_") or key in ("vector_learning_rate", "int8_weights")]
    found = []
    if not full:
        projects = optimizer.startswith("galore")
        for key in [*of_galore, *(["train_embeddings"] if "train_embeddings" in asked else [])]:
            give = "--full" if projects else "--galore, or --full" if key == "train_embeddings" else "--galore"
            text = f" = {asked[key]!r} without full: an adapter is trained, and this is of full training. Give {give}."
            found.append(Problem(key, text))
        if projects:
            text = f" = {optimizer!r} without full: it trains whole weights, not an adapter. Give --full"
            found.append(Problem("optimizer", text + (", or --galore for both." if optimizer == "galore" else ".")))
        return found
    for key in of_galore:
        if optimizer != "galore" and not (optimizer == "galore-torch" and key in OF_GALORE_TORCH):
            text = f" = {asked[key]!r} beside optimizer = {optimizer}, which has no such setting. "
            found.append(Problem(key, text + "Take --optimizer galore, or leave it out."))
    if optimizer != "galore" and asked.get("dtype") == "bfloat16":
        text = f" = 'bfloat16' beside full with optimizer = {optimizer}, of whose updates it rounds most away. "
        found.append(Problem("dtype", text + "Take --optimizer galore, which rounds at random, or --dtype float32."))
    return [*found, *_of_projection(asked, fields), *_beside_full(asked, fields, word)]


def _of_projection(asked: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> list[Problem]:
    """Settings that only another projection has, and a sketch that would not be done when it is needed."""
    found = []
    projection, interval, steps = (
        asked.get(key, fields[key].default)
        for key in ("galore_projection", "galore_update_interval", "galore_sketch_steps")
    )
    if "galore_sketch_steps" in asked and projection != "sketch":
        text = f" = {steps!r} beside galore_projection = {projection}: only a sketch sums steps. Leave one of them out."
        found.append(Problem("galore_sketch_steps", text))
    elif isinstance(steps, int) and isinstance(interval, int) and steps > max(interval, 1):
        text = f" = {steps} beside galore_update_interval = {interval}: a sketch lasts no longer than its subspace."
        found.append(Problem("galore_sketch_steps", f"{text} Take at most {interval}."))
    if "galore_adaptive" in asked and projection == "random":
        text = (
            f" = {asked['galore_adaptive']!r} beside galore_projection = random: a random subspace never stands still."
        )
        found.append(Problem("galore_adaptive", f"{text} Leave one of them out."))
    return found


def _beside_full(asked: Mapping[str, Any], fields: Mapping[str, FieldInfo], word: str) -> list[Problem]:
    """What only an adapter or a frozen base can have, beside full training."""
    texts = {
        "load_in_4bit": "quantised weights cannot be trained. Leave it out, or take --galore --int8-weights.",
        "layers_on_host": "only frozen layers lie on the host, and these are trained. Leave it out.",
        "keep_weights": "only frozen weights are dequantised for a product, and these are trained. Leave it out.",
        "adapter": "whole weights are trained. Put it into its base first: "
        f"lite merge {asked.get('adapter')} -o MODEL, then --model MODEL.",
        "run": f"whole weights are gone on from by --model {asked.get('run')}/model. "
        f"If the run left an adapter: lite merge {asked.get('run')} -o MODEL, then --model MODEL.",
    }
    texts["load_in_8bit"] = texts["load_in_4bit"]
    for key in fields:
        if fields[key].json_schema_extra["panel"] == "Adapter":  # type: ignore[index]
            texts.setdefault(key, "there is no adapter. Leave it out.")
    found = [Problem(key, f" = {asked[key]!r} beside {word}: {text}") for key, text in texts.items() if asked.get(key)]
    if asked.get("embedding_on_host") and asked.get("train_embeddings"):
        text = f" = {asked['embedding_on_host']!r} beside train_embeddings: a trained embedding stays on the card."
        found.append(Problem("embedding_on_host", f"{text} Leave one of them out."))
    return found


# Levers that only recomputed layers have, and what each of them needs.
OF_RECOMPUTED = {
    "keep_attention": "keeps what attention gave for the layer's second forward",
    "keep_weights": "keeps what the layer's second forward dequantised",
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
    settings = {**fields, **Shorthands.model_fields}
    known = [*settings, *signature.hyperparameters]
    method = signature.name
    text = f": no such setting of {method}."
    if ours := spellings.foreign(key, known):
        field = settings.get(ours)
        return f"{text} lite calls it {ours}" + (f": {field.description}" if field else ".")
    if instead := spellings.elsewhere(key):
        return f"{text} {instead}"
    near = spellings.nearest(key, known)
    return text + (f" Did you mean {near}?" if near else f" See `lite {method} --help`.")
