"""Loading: a frozen base in NF4, int8, bf16 or fp32 on its device, and its tokenizer.

Nothing is guessed and nothing is left to chance: weights that a checkpoint lacks, a quantisation that would not reach
every layer, code of the repository's own are errors with advice, where transformers would warn, skip or ask on stdin.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lite.errors import ModelError, raise_collected
from lite.model import catalog, int8, nf4, whole
from lite.model.eight_bits import EightBits
from lite.model.layers import decoder_layers
from lite.model.norms import replace_norms
from lite.model.warm_up import warm_up
from lite.model.weights import move_but_first, weight_bytes
from lite.recipe import Recipe
from lite.sizes import in_gib

log = logging.getLogger(__name__)


def device(recipe: Recipe) -> torch.device:
    """The one device to train on. Raises ModelError if CUDA is asked for and absent."""
    if recipe.device == "cpu" or (recipe.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}, but no GPU answers: see nvidia-smi"
        raise ModelError(
            f"device = 'cuda': torch {torch.__version__} is built "
            + (built if torch.version.cuda else "without CUDA: install a CUDA build")
            + ". Or train on the CPU with --device cpu."
        )
    return torch.device("cuda", torch.cuda.current_device())


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype of activations and of unquantised weights; `auto`: bf16 where the hardware multiplies it, else fp32."""
    if recipe.dtype != "auto":
        return torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
    on_gpu = device(recipe).type == "cuda"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_multiplies_bf16()
    return torch.bfloat16 if fast else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has AVX512-BF16 or AMX; without them a bf16 product is three times slower than an fp32 one."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's own tokenizer. Raises ModelError saying what is missing and where to get it."""
    source = _source(recipe)
    with _explained(recipe, source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
        )
    # Where the files are missing, transformers makes up a tokenizer of special tokens that turns every text into none.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ModelError(
            f"{source}: there is no tokenizer in it. Expected tokenizer.json, or the files that the model's own "
            "tokenizer reads: copy them from where the model comes from."
        )
    return tokenizer


def config_of(recipe: Recipe, *, alone: bool = False) -> PreTrainedConfig:
    """The model's own config, from its folder or the hub; `alone`: weights may be missing. Raises ModelError."""
    source = _source(recipe, alone=alone)
    with _explained(recipe, source, "model"):
        return AutoConfig.from_pretrained(source, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)


def is_here(recipe: Recipe) -> bool:
    """Whether the model's config can be read without a network."""
    source = _source(recipe)
    return Path(source).is_dir() or isinstance(
        try_to_load_from_cache(source, "config.json", revision=recipe.revision), str
    )


def load_model(recipe: Recipe, *, host_layers: int = 0) -> PreTrainedModel:
    """The base model on its device, quantised as asked, every weight frozen, in eval mode, with its cache off.

    A bitsandbytes checkpoint is loaded as it is, with the recipe's compute dtype. `generate` still caches: that is
    its generation config's affair. `config._commit_hash` is the commit of a model from the hub, else None.
    host_layers: the first so many layers stay in host memory, for `stream_layers`. All is loaded there first, and
    quantised by the CPU (25 M weights/s on two cores: a 70B model is better taken as a bitsandbytes checkpoint).
    Raises ModelError with what to do.
    """
    source, target, dtype = _source(recipe), device(recipe), compute_dtype(recipe)
    config = config_of(recipe)
    commit = _commit(recipe, source, config)
    require_trainable(recipe, config)
    quantisation = _quantisation(recipe, config, dtype)
    if quantisation is not None:
        with torch.device("meta"), _explained(recipe, recipe.model, "model"):
            code = {"trust_remote_code": recipe.trust_remote_code}
            require_reach(recipe, AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **code))
    with _explained(recipe, source, "model"):
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=commit or recipe.revision,
            trust_remote_code=recipe.trust_remote_code,
            dtype=dtype,
            device_map={"": torch.device("cpu") if host_layers else target},
            quantization_config=EightBits() if recipe.int8_weights else quantisation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, together with what is missing
        )
    # transformers fills what a checkpoint lacks with random numbers and warns; training on those helps nobody.
    problems = [f"{name}: not in the checkpoint" for name in sorted(report["missing_keys"])]
    problems += [
        f"{name}: {tuple(found)} in the checkpoint, {tuple(expected)} by config.json"
        for name, found, expected in sorted(report["mismatched_keys"])
    ]
    advice = "Fetch the checkpoint again, whole, with its own config.json."
    raise_collected(ModelError, f"{source}: config.json and weights do not fit:", problems, advice)
    model.config.use_cache, model.config._commit_hash = False, commit
    model.requires_grad_(False).eval()
    if host_layers:
        with _explained(recipe, source, "model"):
            move_but_first(model, target, host_layers)
    replace_norms(model)
    steady(model)
    warm_up(model, target, dtype)
    kind = "int8" if recipe.int8_weights else _kind(model, dtype)
    log.info("loaded %s in %s: %s", recipe.model, kind, in_gib(weight_bytes(model)))
    return model


def require_there(recipe: Recipe, setting: str) -> None:
    """Raise ModelError, in the name of the setting, if the recipe's model can be seen not to exist or to be none."""
    try:
        _source(recipe)
    except ModelError as error:
        raise ModelError(str(error).replace("model = ", f"{setting} = ", 1)) from None


def _source(recipe: Recipe, *, alone: bool = False) -> str:
    """Folder or hub name, checked as far as one can offline; a folder absolute, for adapters will name it."""
    name = catalog.resolve(recipe.model)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith(("/", "./", "../", "~")) or name.count("/") != 1:
            raise ModelError(f"model = {recipe.model!r}: there is no folder {folder}. Expected one with a config.json.")
        return name
    problems = []
    if recipe.revision is not None:
        problems.append(f"revision = {recipe.revision!r} is of a hub name; a folder has none. Leave it out.")
    if not (folder / "config.json").is_file():
        hint = " It is an adapter: pass it as --adapter." if (folder / "adapter_config.json").is_file() else ""
        run = (folder / "recipe.yaml").is_file()
        hint = f" It is a run: name its model, {folder}/model, or pass it as --run." if run else hint
        problems.append(f"there is no config.json in it.{hint}")
    if not alone and not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        problems.append("there are no weights in it (*.safetensors or pytorch_model*.bin).")
    advice = "Expected a model's folder, as `hf download NAME --local-dir FOLDER` or save_pretrained leaves it."
    raise_collected(ModelError, f"{folder} cannot be loaded:", problems, advice)
    return str(folder.resolve())


def _commit(recipe: Recipe, source: str, config: PreTrainedConfig) -> str | None:
    """The commit of the hub that the config came in, so that the weights come from the same; None of a folder."""
    if Path(source).is_dir():
        return None
    if found := getattr(config, "_commit_hash", None):  # older releases of transformers say it
        return found
    path = try_to_load_from_cache(source, "config.json", revision=recipe.revision)
    return Path(path).parent.name if isinstance(path, str) else None


@contextmanager
def _explained(recipe: Recipe, source: str, what: str) -> Iterator[None]:
    """Turn what transformers raises over a user's model into a ModelError that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{source} does not fit the GPU: {_first_line(error)}.{_smaller(recipe)}") from None
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{source} brings Python code of its own, which lite does not run unasked. "
                "Read it, then pass --trust-remote-code."
            ) from None
        fetched = (
            ""
            if Path(source).is_dir()
            else f"\nWithout a network: `hf download {source} --local-dir FOLDER` elsewhere, then --model FOLDER. "
            "Models behind a licence need `hf auth login` first."
        )
        raise ModelError(f"{source}: its {what} cannot be loaded: {_first_line(error)}{fetched}") from error


def _smaller(recipe: Recipe) -> str:
    """What the same model takes less room with, beside what the recipe has: nothing quantised is trained itself."""
    if recipe.full:
        can = recipe.optimizer == "galore" and not recipe.int8_weights
        return " --int8-weights takes half of bf16's memory." if can else " An adapter on a base in --4bit takes less."
    return "" if recipe.load_in_4bit else " --4bit takes a quarter of bf16's memory."


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _quantisation(recipe: Recipe, config: PreTrainedConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What to quantise by: nothing for a checkpoint that is quantised already, and it must be as asked."""
    asked = "--4bit" if recipe.load_in_4bit else "--8bit" if recipe.load_in_8bit else None
    present = config.to_dict().get("quantization_config")
    if present is None:
        if recipe.load_in_4bit:
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        return BitsAndBytesConfig(load_in_8bit=True) if recipe.load_in_8bit else None
    kind = _by_whom(present)
    if asked and not present.get("load_in_4bit" if recipe.load_in_4bit else "load_in_8bit"):
        raise ModelError(
            f"{asked}: {recipe.model} is quantised already, as {kind}, and would have to be dequantised first. "
            f"Leave {asked} out to train on it as it is, or take the unquantised model."
        )
    log.info("%s is quantised already (%s) and is loaded as it is", recipe.model, kind)
    if present.get("load_in_4bit"):
        # A matter of the machine, not of the stored weights.
        config.quantization_config = {**present, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    return None


def require_trainable(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raise ModelError, before anything is loaded, if weights are to be trained that are quantised in their files."""
    present = config.to_dict().get("quantization_config")
    whole.require_plain(recipe, None if present is None else _by_whom(present))


def _by_whom(quantisation: dict) -> str:
    bits = next((bits for bits in (4, 8) if quantisation.get(f"load_in_{bits}bit")), None)
    return f"bitsandbytes {bits}-bit" if bits else str(quantisation.get("quant_method"))


def require_reach(recipe: Recipe, skeleton: PreTrainedModel) -> None:
    """Refuse to quantise a model whose experts bitsandbytes passes over: the bulk of it would stay bf16, unsaid."""
    passed_over = {
        f"{layer}.{name}": parameter
        for layer, block in decoder_layers(skeleton).items()
        for name, parameter in block.named_parameters()
        if parameter.ndim == 3
    }
    total_bytes = sum(parameter.nbytes for parameter in passed_over.values())
    flag = "--4bit" if recipe.load_in_4bit else "--8bit"
    raise_collected(
        ModelError,
        f"{flag}: {recipe.model} is a mixture of experts whose {len(passed_over)} expert tensors bitsandbytes cannot "
        f"quantise; {in_gib(total_bytes)} of them would stay bf16:",
        [f"{name} {tuple(p.shape)}: {in_gib(p.nbytes)}" for name, p in passed_over.items()],
        f"Leave {flag} out if the card holds the model in bf16, or take a dense model.",
    )


def steady(model: PreTrainedModel) -> None:
    """Let quantised layers compute the same in evaluation, in training, and beside any other tokens."""
    int8.replace_forward(model)
    nf4.replace_forward(model)


def _kind(model: PreTrainedModel, dtype: torch.dtype) -> str:
    quantised = model.config.to_dict().get("quantization_config")
    if quantised is None:
        return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    if quantised.get("load_in_4bit"):
        return str(quantised["bnb_4bit_quant_type"])
    return "int8" if quantised.get("load_in_8bit") else str(quantised["quant_method"])
