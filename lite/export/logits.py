"""What a source's model says next, by transformers, with the weights of one module in memory at a time.

The model is built without weights. Before a module runs, its weights are read from the source; after it, they are
gone. The sequences go through together, so that a model of any size is read once for them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lite.errors import ExportError, raise_collected
from lite.merge.source import Source
from lite.model.head import backbone
from lite.model.shards import Weights

HEAD_BYTES = 64 * 2**20  # of the head's rows in fp32 at once
# Of a mixture of experts transformers stacks what checkpoints have one by one: its name → theirs, in this order.
STACKED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
# Parts of transformers' names, and how checkpoints have them: Mixtral's, of models with images, without a head.
OTHERWISE = (
    (".mlp.", ".block_sparse_moe."),
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", ""),
)
PLACEHOLDER = 0  # the token that pads
TOGETHER_TOKENS = 1024  # of a sequence that goes with others, at most


def next_states(source: Source, sequences: Sequence[Sequence[int]], at: Sequence[Sequence[int]]) -> list[Tensor]:
    """What the model's head is given after the positions `at` of each sequence: (positions, D) float32 of each.

    Computed in fp32 with eager attention, on a GPU if there is one, where it stays. Raises ExportError if weights that
    the model needs are not there.
    """
    # A long one goes alone: among the short ones it would have all of them padded to its length.
    short = [i for i, sequence in enumerate(sequences) if len(sequence) <= TOGETHER_TOKENS]
    batches = [*([short] if short else []), *([i] for i in range(len(sequences)) if i not in short)]
    found: dict[int, Tensor] = {}
    for batch in batches:
        longest = max(len(sequences[i]) for i in batch)
        # Padding comes after a sequence, where no causal model sees it.
        padded = [[*sequences[i], *[PLACEHOLDER] * (longest - len(sequences[i]))] for i in batch]
        ids = torch.tensor(padded)  # (B, T)
        model, device = streamed(source, ids)
        with torch.inference_mode():
            hidden = backbone(model)(input_ids=ids.to(device), use_cache=False).last_hidden_state  # (B, T, D)
            found |= {i: hidden[row, list(at[i])] for row, i in enumerate(batch)}
    return [found[i] for i in range(len(sequences))]


def next_logps(source: Source, states: Tensor) -> Tensor:
    """Log-probability of every token of the vocabulary after each state (N, D): (N, V) float32, nats, on the CPU."""
    head = _head_names(_skeleton(source, torch.device("cpu")), source.weights)
    with torch.inference_mode():
        logits = _logits(states, source, head)
        logits -= logits.logsumexp(-1, keepdim=True)  # in place: the whole of it is large
        return logits.cpu()


def streamed(source: Source, ids: Tensor) -> tuple[PreTrainedModel, torch.device]:
    """The source's model, whose backbone reads each module's weights as it runs, and the device that it runs on.

    ids: every token that it will be given. Of the head nothing is read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _skeleton(source, device)
    _read_on_demand(model, source.weights, ids, device)
    return model, device


def own_names(name: str, weights: Weights) -> list[str]:
    """The checkpoint's tensors that a parameter of transformers' is made of; [] for one that is not there."""
    return [piece for pieces in _pieces(name, weights) for piece in pieces]


def _skeleton(source: Source, device: torch.device) -> PreTrainedModel:
    """The model with its buffers on the device and every parameter on meta."""
    settings = dict(source.config)
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    except (KeyError, ValueError, TypeError) as error:
        raise ExportError(f"{source.name}: transformers cannot build its model from config.json: {error}") from error
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.eval()


def _read_on_demand(model: PreTrainedModel, weights: Weights, ids: Tensor, device: torch.device) -> None:
    """Let each module of the backbone read its weights before it runs, and drop them after."""
    inside = {id(module) for module in backbone(model).modules()}
    embedding, problems = model.get_input_embeddings(), []
    for path, module in model.named_modules():
        names = {name: f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
        if id(module) not in inside or not names:
            continue
        problems += [f"{name}: not in the weights" for name in names.values() if not _pieces(name, weights)]
        shells = dict(module.named_parameters(recurse=False))

        def fill(module: nn.Module, _: Any, *, names: dict[str, str] = names) -> None:
            for name, full in names.items():
                tensor = _rows_of(full, weights, ids) if module is embedding else _whole(full, weights)
                module.register_parameter(name, nn.Parameter(tensor.to(device, torch.float32), requires_grad=False))

        def drop(module: nn.Module, *_: Any, shells: dict[str, nn.Parameter] = shells) -> None:
            for name, shell in shells.items():
                module.register_parameter(name, shell)

        module.register_forward_pre_hook(fill)
        module.register_forward_hook(drop)
    raise_collected(ExportError, "The model cannot be run to compare with:", problems)


def _rows_of(name: str, weights: Weights, ids: Tensor) -> Tensor:
    """The embedding with the rows that are looked up; the others are never written, so that they take no memory."""
    (own,) = _pieces(name, weights)[0]
    shape = weights.shapes[own]
    table = torch.empty(shape, dtype=torch.float32)  # (V, D)
    for row in ids.unique().tolist():
        table[row] = weights.rows(own, row, row + 1)[0].float()
    return table


def _whole(name: str, weights: Weights) -> Tensor:
    """A parameter of transformers' from the checkpoint's tensors: itself, or its experts joined and stacked."""
    parts = [[weights.rows(piece).float() for piece in pieces] for pieces in _pieces(name, weights)]
    if len(parts) == 1 and len(parts[0]) == 1:
        return parts[0][0]
    return torch.stack([torch.cat(pieces) for pieces in parts])


def _pieces(name: str, weights: Weights) -> list[list[str]]:
    """The checkpoint's tensors that a parameter is made of: stacked over the outer list, joined over the inner one."""
    for known in (name, *(name.replace(ours, theirs, 1) for ours, theirs in OTHERWISE)):
        if known in weights.shapes:
            return [[known]]
        prefix, _, last = known.rpartition(".")
        for words in STACKED.get(last, ()) if prefix.endswith(".experts") else ():
            found = []
            while all(f"{prefix}.{len(found)}.{word}.weight" in weights.shapes for word in words):
                found.append([f"{prefix}.{len(found)}.{word}.weight" for word in words])
            if found:
                return found
    return []


def _head_names(model: PreTrainedModel, weights: Weights) -> list[str]:
    """Weight and, if it has one, bias of the head: those of the embedding, where they are tied."""
    paths = {id(module): path for path, module in model.named_modules()}
    head = paths[id(model.get_output_embeddings())]
    own = [piece for kind in ("weight", "bias") for piece in own_names(f"{head}.{kind}", weights)]
    return own or own_names(f"{paths[id(model.get_input_embeddings())]}.weight", weights)


def _logits(hidden: Tensor, source: Source, head: Sequence[str]) -> Tensor:
    """(N, V) of the hidden states (N, D), with the model's cap."""
    name, *bias = head
    rows, width = source.weights.shapes[name]
    at_once = max(1, HEAD_BYTES // (4 * width))
    logits = torch.cat(
        [
            hidden @ source.weights.rows(name, start, min(start + at_once, rows)).to(hidden.device, hidden.dtype).T
            for start in range(0, rows, at_once)
        ],
        dim=-1,
    )
    if bias:
        logits += source.weights.rows(bias[0]).to(logits.device, logits.dtype)
    cap = source.config.get("final_logit_softcapping")
    return logits if not cap or math.isinf(cap) else cap * torch.tanh(logits / cap)
