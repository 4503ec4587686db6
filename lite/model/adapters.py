"""Adapters: put LoRA on a frozen model, save it as peft does, load it back strictly.

Weights are fp32 masters that compute in the activation's dtype (lora.py). What is saved is a plain peft folder, which
any user of peft loads; what is loaded must fit tensor for tensor, or is refused before anything was changed.
"""

import copy
import logging
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lite.errors import ModelError, raise_collected
from lite.model import lora
from lite.model.head import unwrapped
from lite.model.layers import decoder_layers
from lite.model.mlp import replace_mlps
from lite.model.rotate import replace_rotary
from lite.model.siblings import replace_projections
from lite.recipe import Recipe

log = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
WEIGHTS = "adapter_model.safetensors"
ORIGIN = frozenset(("base_model_name_or_path", "revision", "inference_mode", "peft_version"))
ROUTERS = frozenset(("gate", "router", "shared_expert_gate"))  # their names in mixtures of experts


def attach(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """The model with a LoRA adapter: a new one as the recipe says, or the one that `adapter` or `run` names.

    A new adapter's start depends on the seed alone. Only the adapter's weights are trained, fp32 whatever the base is.
    Raises ModelError where a target does not exist, or a saved adapter does not fit the model or the recipe.
    """
    folder = continued_from(recipe)
    if folder is None:
        config = _config(recipe, target_names(model, recipe.lora_target_modules))
    else:
        settle(recipe)
        config = _saved_config(folder)
        _check_fit(model, _read(folder), folder)
        _note_base(model, config, folder)
    # peft makes A on the CPU and then moves it, so the CPU's generator alone decides how it starts.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(recipe.seed)
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names that peft uses
        adapted = get_peft_model(model, config)
    # peft copies whole modules (modules_to_save) in the base's dtype. bf16 loses most of an update of 1e-5.
    rounded = [f"{name}: {p.dtype}" for name, p in adapted.named_parameters() if p.requires_grad and p.itemsize < 4]
    advice = "Train with --dtype float32, or go on from an adapter without modules_to_save."
    raise_collected(ModelError, f"{folder}: weights that cannot be trained in so few bits:", rounded, advice)
    lora.replace_forward(adapted)
    replace_projections(adapted)
    replace_mlps(adapted)
    replace_rotary(adapted)
    if folder is not None:
        load(adapted, folder)
        log.info("goes on from the adapter in %s", folder)
    if model.device.type == "meta":  # of a plan, which tells other things
        return adapted
    log.info("%s", trainable(adapted))
    experts = [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and "lora_" not in name]
    if experts:
        log.info("the experts are no linear layers and stay as they are: %s …", experts[0])
    return adapted


def save(model: PeftModel, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, named and laid out as peft does, in its live dtype.

    The same adapter gives the same bytes: peft's own save writes the targets in the order of a set, which changes from
    process to process, and a model card of blanks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in _state(model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))


def load(model: PeftModel, folder: Path) -> None:
    """Copy the saved adapter into the live one, whose dtypes stay as they are.

    Every tensor must be there, none may be left over, and shapes must be equal; else ModelError names each with both
    shapes, and nothing was copied.
    """
    saved, live = _read(folder), _state(model)
    problems = [f"{name}: missing in the file, the model has {_shape(live, name)}" for name in live.keys() - saved]
    problems += [
        f"{name}: {_shape(saved, name)} in the file, the model has no such tensor" for name in saved.keys() - live
    ]
    problems += [
        f"{name}: {_shape(saved, name)} in the file, the model's is {_shape(live, name)}"
        for name in live.keys() & saved
        if live[name].shape != saved[name].shape
    ]
    advice = "Expected the adapter that was trained with these settings on this model."
    raise_collected(ModelError, f"{folder / WEIGHTS} does not fit the model:", sorted(problems), advice)
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])


def content(source: PeftModel | Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What decides an adapter's numbers, of a live one or a saved one: its tensors, and its settings."""
    live = isinstance(source, PeftModel)
    settings = (source.peft_config[source.active_adapter] if live else _saved_config(source)).to_dict()
    # All but those that say where it comes from: peft has many that scale or place the same tensors otherwise. Those
    # that are off are left out, so that a later peft, which has more, says the same.
    decides = {name: value for name, value in settings.items() if value and name not in ORIGIN}
    return (_state(source) if live else _read(source)), decides


def trainable(model: PeftModel) -> str:
    """`0.5 % of weights trained`; a quantised weight counts as one."""
    trained, total = model.get_nb_trainable_parameters()
    return f"{100 * trained / total:.2g} % of weights trained"


def continued_from(recipe: Recipe) -> Path | None:
    """Folder of the adapter that the recipe goes on from, or None. Raises ModelError if there is no adapter in it."""
    folder = Path(recipe.adapter) if recipe.adapter else Path(recipe.run) / "adapter" if recipe.run else None
    if folder is None:
        return None
    files = ("adapter_config.json", WEIGHTS)
    missing = [f"{folder / name}: no such file" for name in files if not (folder / name).is_file()]
    named = f"adapter = {recipe.adapter!r}" if recipe.adapter else f"run = {recipe.run!r}"
    if missing and recipe.run and (model := Path(recipe.run) / "model").is_dir():
        raise ModelError(f"{named}: this run trained whole weights and left no adapter. Go on from --model {model}.")
    if missing and recipe.run and (Path(recipe.run) / "checkpoints").is_dir():
        raise ModelError(f"{named}: this run has not finished. Let it: `lite resume {recipe.run}`.")
    raise_collected(
        ModelError, f"{named}: no adapter to go on from:", missing, "Expected a LoRA adapter as peft saves it."
    )
    return folder


def settle(recipe: Recipe) -> Recipe:
    """The recipe with the settings of the adapter that it goes on from; itself if it starts a new one.

    To be called before a run's recipe is saved, so that the saved one holds what was trained and reruns it.
    Raises ModelError for each setting that the recipe sets to something else.
    """
    folder = continued_from(recipe)
    if folder is None:
        return recipe
    saved = _settings(_saved_config(folder))
    conflicts = [
        f"{name} = {getattr(recipe, name)!r}, but the adapter has {value!r}"
        for name, value in saved.items()
        if name in recipe.model_fields_set and not _same(name, getattr(recipe, name), value)
    ]
    raise_collected(ModelError, f"{folder}: the adapter was trained otherwise:", conflicts, "Leave these settings out.")
    return recipe.model_copy(update=saved)


def target_names(model: nn.Module, asked: str) -> list[str]:
    """Names of the layers to adapt, as short as they can be (`q_proj`) without meaning any layer elsewhere.

    `all-linear` is every linear layer of the decoder blocks: not the head, the embeddings, a router, or another tower.
    The head can be asked for by its name.
    """
    linear = _linear_layers(model)
    head = [name for name, module in unwrapped(model).named_modules() if module is model.get_output_embeddings()]
    if not linear:
        kinds = sorted({type(m).__name__ for layer in decoder_layers(model).values() for m in layer.modules()})
        raise ModelError(f"no linear layer to adapt in the decoder blocks. They hold {', '.join(kinds)}.")
    if asked.strip() == ALL_LINEAR:
        chosen = linear
    else:
        wanted = [name.strip() for name in asked.split(",")]
        chosen = [name for name in linear + head if any(_matches(name, one) for one in wanted)]
        unknown = [one for one in wanted if not any(_matches(name, one) for name in linear + head)]
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear + head}))
        problems = [f"{one or repr(one)}: no such linear layer" for one in unknown]
        raise_collected(
            ModelError, "lora_target_modules:", problems, f"Expected {ALL_LINEAR}, or names out of: {known}."
        )
    short = sorted({name.rpartition(".")[2] for name in chosen})
    everywhere = [name for name, _ in unwrapped(model).named_modules() if any(_matches(name, one) for one in short)]
    return short if set(everywhere) == set(chosen) else sorted(chosen)


def _linear_layers(model: nn.Module) -> list[str]:
    # bitsandbytes' layers are nn.Linear too. A router is a plain parameter, a linear layer, or a module that has one.
    return [
        f"{path}.{name}"
        for path, layer in decoder_layers(model).items()
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and ROUTERS.isdisjoint(name.split("."))
    ]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _config(recipe: Recipe, targets: list[str]) -> LoraConfig:
    return LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        revision=recipe.revision,
        task_type="CAUSAL_LM",
    )


def _saved_config(folder: Path) -> LoraConfig:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}/adapter_config.json cannot be read: {error!r}. Expected what peft saves.") from None
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder}: an adapter of type {config.peft_type}. Expected LoRA.")
    config.inference_mode = False
    return config


def _settings(config: LoraConfig) -> dict[str, object]:
    targets = config.target_modules
    return {
        "lora_r": config.r,
        "lora_alpha": float(config.lora_alpha),
        "lora_dropout": float(config.lora_dropout),
        "lora_target_modules": targets if isinstance(targets, str) else ",".join(sorted(targets)),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }


def _same(name: str, asked: object, saved: object) -> bool:
    if name != "lora_target_modules":
        return asked == saved
    return {part.strip() for part in str(asked).split(",")} == {part.strip() for part in str(saved).split(",")}


def _check_fit(model: PreTrainedModel, saved: dict[str, Tensor], folder: Path) -> None:
    """Compare the saved A and B with the layers that they belong to, before the model is touched."""
    modules = dict(model.named_modules())
    problems = []
    for name, tensor in sorted(saved.items()):
        layer, _, matrix = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if layer not in modules:
            problems.append(f"{layer}: the model has no such layer")
        elif isinstance(modules[layer], nn.Linear) and matrix in ("lora_A", "lora_B"):
            axis, size = (1, modules[layer].in_features) if matrix == "lora_A" else (0, modules[layer].out_features)
            if tensor.shape[axis] != size:
                side = "in" if matrix == "lora_A" else "out"
                problems.append(f"{layer}: {matrix} is {tuple(tensor.shape)}, but the layer has {size} {side}")
    advice = f"Expected an adapter of {model.name_or_path}."
    raise_collected(ModelError, f"{folder}: the adapter belongs to another model:", problems, advice)


def _note_base(model: PreTrainedModel, config: LoraConfig, folder: Path) -> None:
    trained_on = config.base_model_name_or_path
    if trained_on and trained_on != model.name_or_path:
        log.warning("%s was trained on %s and goes on on %s: is it the same?", folder, trained_on, model.name_or_path)
    config.base_model_name_or_path = None  # peft then takes the model's, without a warning of its own


def _state(model: PeftModel) -> dict[str, Tensor]:
    # The live parameters, by the names they are saved under. Handing them in keeps peft from packing the whole
    # quantised base into a state dict; save_embedding_layers, from asking the hub whether the vocabulary has grown.
    return get_peft_model_state_dict(model, state_dict=dict(model.named_parameters()), save_embedding_layers=False)


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...]:
    return tuple(tensors[name].shape)


def _read(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS} cannot be read: {error}. Expected a whole safetensors file.") from None
