"""The decoder layers of a causal language model, found the same way whatever its architecture and wrapping."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lite.errors import ModelError
from lite.model.head import backbone, unwrapped


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of the language model by their name in the unwrapped model, first to last.

    Towers of other modalities have blocks of their own and are left out. Raises ModelError where there are none.
    """
    base, decoder = unwrapped(model), backbone(model)
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList) and module}
    known = [name for name, blocks in lists.items() if all(isinstance(b, GradientCheckpointingLayer) for b in blocks)]
    # Code of a repository's own may derive its blocks from anything: there they are the longest list at the top.
    outer = sorted((name for name in lists if "." not in name), key=lambda name: -len(lists[name]))
    if not known + outer:
        raise ModelError(
            f"{type(base).__name__} has no list of decoder layers. Expected a decoder-only language model."
        )
    prefix = next((name for name, module in base.named_modules() if module is decoder), "")
    path = ".".join(part for part in (prefix, (known + outer)[0]) if part)
    return {f"{path}.{index}": layer for index, layer in enumerate(lists[(known + outer)[0]])}
