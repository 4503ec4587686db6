"""Rotary schemes whose factors depend on the longest position of the forward, so that layouts must heed them."""

from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig


class Regimes(NamedTuple):
    """Where a model's rotary factors change with length."""

    bound: int | None  # longest length with the factors of short texts; None: the factors never change
    grows: bool  # beyond the bound they depend on the very length (dynamic NTK), not only on being beyond (LongRoPE)


def regimes(config: PretrainedConfig) -> Regimes:
    """The regimes of a model; of several rotary schemes in one model, the lowest bound."""
    text = config.get_text_config()
    found = []
    for scheme in _schemes(text.to_dict()):
        if scheme["rope_type"] == "longrope":
            # Phi-3 keeps it beside the scheme, newer configs within.
            original = scheme.get("original_max_position_embeddings") or text.original_max_position_embeddings
            found.append(Regimes(int(original), False))
        elif scheme["rope_type"] == "dynamic":
            found.append(Regimes(int(text.max_position_embeddings), True))
    return min(found, default=Regimes(None, False), key=lambda regime: regime.bound)


def restart(decoder: nn.Module) -> None:
    """Let the next forward's factors depend on that forward alone.

    transformers keeps those of the longest text since the last short one (dynamic NTK), so that a completion's score
    would depend on what was scored before it.
    """
    for module in decoder.children():
        for cached in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            if getattr(module, cached) != module.original_max_seq_len:
                scheme = cached.removesuffix("max_seq_len_cached")  # "", or the type of layers and an underscore
                getattr(module, f"{scheme}inv_freq").copy_(getattr(module, f"{scheme}original_inv_freq"))
                setattr(module, cached, module.original_max_seq_len)


def still(model: nn.Module) -> None:
    """Let factors stay those of short texts, for a dry run: a meta tensor has no longest position to ask for.

    They are as many numbers whatever the length, so memory and time are the same.
    """
    for module in model.modules():
        schemes = vars(module).get("rope_type")
        if isinstance(schemes, dict):
            module.rope_type = {layers: _without_length(scheme) for layers, scheme in schemes.items()}
        elif isinstance(schemes, str):
            module.rope_type = _without_length(schemes)


def _without_length(scheme: str) -> str:
    return "default" if scheme in ("dynamic", "longrope") else scheme


def _schemes(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A config holds one scheme, or one for each type of layer (Gemma 3)."""
    rope = settings.get("rope_parameters") or {}
    nested = [value for value in rope.values() if isinstance(value, dict) and "rope_type" in value]
    return nested or ([rope] if "rope_type" in rope else [])
