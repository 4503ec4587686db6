"""Recipe: the only place where a setting, its default, unit, range and help line are written.

A recipe is flat. Beside the fields below it carries the hyperparameters of its loss (`beta: 0.1`), which the loss's
signature owns; `recipe.hyperparameters` is all of them, set or default. Precedence: defaults < file < flags.
"""

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lite import signatures
from lite.errors import RecipeError, raise_collected

BUNDLED = "bundled"


def setting(default: Any, description: str, *, panel: str, unit: str = "", flag: str = "", **limits: Any) -> Any:
    """A field of the recipe; `panel` groups the help, `unit` ends its line, `flag` is a shorter name for it."""
    return Field(default, description=description, json_schema_extra={"panel": panel, "unit": unit, "flag": flag}, **limits)


class Recipe(BaseModel):
    """Every setting of a run. Raises RecipeError naming each wrong key and value at once."""

    model_config = ConfigDict(extra="allow", frozen=True, validate_default=False, protected_namespaces=())

    method: str = setting("orpo", "The loss: a registered one, or file.py:function.", panel="Method")

    model: str = setting(BUNDLED, "A folder, a hub name, an alias such as qwen-14b, or `bundled`.", panel="Model")
    revision: str | None = setting(None, "Branch, tag or commit of the model on the hub.", panel="Model")
    trust_remote_code: bool = setting(False, "Run Python code that the model repository brings.", panel="Model")
    dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto", "Compute type; auto is bfloat16 where the hardware multiplies it, else float32.", panel="Model"
    )
    load_in_4bit: bool = setting(
        False, "Quantise the base to NF4, its scales quantised again.", panel="Model", flag="--4bit"
    )
    load_in_8bit: bool = setting(False, "Quantise the base to int8.", panel="Model", flag="--8bit")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "Where to train; auto takes a GPU if there is one.", panel="Model")
    attn_implementation: Literal["auto", "flash", "varlen", "sdpa", "eager", "padded"] = setting(
        "auto", "Attention over packs; padded gives packs up and pads each completion alone.", panel="Model"
    )

    lora_r: int = setting(16, "Rank of the adapter.", panel="Adapter", ge=1)
    lora_alpha: float = setting(32.0, "Scale of the adapter: its update is multiplied by alpha / r.", panel="Adapter", gt=0)
    lora_dropout: float = setting(0.0, "Dropout on the adapter's input.", panel="Adapter", ge=0, lt=1)
    lora_target_modules: str = setting(
        "all-linear", "Names of the adapted layers, comma-separated; all-linear: every one in the blocks.", panel="Adapter"
    )
    use_rslora: bool = setting(False, "Scale by alpha / √r (rank-stabilised LoRA).", panel="Adapter")
    use_dora: bool = setting(False, "Train magnitude and direction apart (DoRA).", panel="Adapter")
    adapter: str | None = setting(None, "Folder of an adapter to go on from.", panel="Adapter")
    run: str | None = setting(None, "Finished run whose adapter to go on from.", panel="Adapter")

    data: str = setting(BUNDLED, "JSONL, JSON, CSV or Parquet file, or `-` for JSONL on stdin.", panel="Data")
    eval_data: str | None = setting(None, "Held-out rows; without it min(5 %, 200) rows, chosen by content.", panel="Data")
    format: str | None = setting(None, "Row layout; without it the one whose keys match best.", panel="Data")
    columns: dict[str, str] = setting({}, "Your names of the columns: prompt=question,chosen=good.", panel="Data")
    chat_template: str = setting(
        "auto", "auto: the model's own; none: plain text; or a Jinja file.", panel="Data"
    )
    max_length: int = setting(2048, "Longest prompt and completion together.", panel="Data", unit="tokens", ge=8)
    skip_bad_rows: bool = setting(False, "Go on without unreadable rows; they are listed in the run.", panel="Data")
    allow_dropped: bool = setting(False, "Go on though more than 5 % of the rows are too long.", panel="Data")

    num_train_epochs: float = setting(1.0, "Passes over the data.", panel="Training", gt=0)
    max_steps: int | None = setting(None, "Stop after so many optimizer steps.", panel="Training", unit="steps", ge=1)
    batch_size: int = setting(16, "Examples per optimizer step, however they are laid out.", panel="Training", ge=1)
    learning_rate: float | None = setting(None, "Peak learning rate; without it the loss's own.", panel="Training", gt=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = setting(
        "cosine", "Course of the learning rate.", panel="Training"
    )
    warmup_ratio: float = setting(0.1, "Share of the steps over which the rate rises.", panel="Training", ge=0, lt=1)
    weight_decay: float = setting(0.0, "Decoupled weight decay.", panel="Training", ge=0)
    max_grad_norm: float = setting(1.0, "Clip the gradient to this norm; 0 leaves it.", panel="Training", ge=0)
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = setting(
        "adamw", "8bit: states in eight bits; paged: they may move to host memory.", panel="Training"
    )
    adam_beta1: float = setting(0.9, "Decay of the first moment.", panel="Training", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "Decay of the second moment.", panel="Training", ge=0, lt=1)
    adam_epsilon: float = setting(1e-8, "Added to the root of the second moment.", panel="Training", gt=0)
    seed: int = setting(42, "Of the order of the rows, the adapter's start and dropout.", panel="Training", ge=0)

    gradient_checkpointing: bool = setting(
        True, "Keep each layer's input only and compute the layer again in backward.", panel="Memory"
    )
    tokens_per_pack: int = setting(8192, "Most tokens of one forward; a longer example is alone.", panel="Memory", unit="tokens", ge=8)
    chunk_tokens: int = setting(1024, "Scored tokens whose logits exist at once.", panel="Memory", unit="tokens", ge=1)
    split_pairs: bool = setting(
        False, "A pair over tokens_per_pack is computed one completion at a time, exactly.", panel="Memory"
    )

    output_dir: str | None = setting(None, "The run folder; without it runs/METHOD-MODEL-TIME.", panel="Run")
    logging_steps: int = setting(1, "A line of metrics every so many steps.", panel="Run", unit="steps", ge=1)
    eval_steps: int | None = setting(None, "Evaluate every so many steps, beside before and after.", panel="Run", unit="steps", ge=1)
    save_steps: int = setting(50, "A checkpoint every so many steps.", panel="Run", unit="steps", ge=1)
    save_total_limit: int = setting(2, "Checkpoints kept, the newest.", panel="Run", ge=1)
    samples: int = setting(3, "Held-out prompts answered before and after training.", panel="Run", ge=0)
    report_to: str = setting("none", "Trackers, comma-separated: wandb, tensorboard, mlflow …", panel="Run")
    self_check: bool = setting(True, "Compare the fast path with the plain model before step 1.", panel="Run")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc'])) or 'recipe'} = {e['input']!r}: {e['msg']}" for e in error.errors()]
            raise_collected(RecipeError, "The recipe cannot be used:", problems)

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        problems = []
        hyperparameters = signatures.find(self.method).hyperparameters
        for key, value in (self.model_extra or {}).items():
            if key not in hyperparameters:
                problems.append(unknown_key(key, self.method))
            elif problem := hyperparameters[key].problem(value):
                problems.append(problem)
        if self.load_in_4bit and self.load_in_8bit:
            problems.append("load_in_4bit and load_in_8bit: a base is quantised once. Take one of them.")
        if self.adapter and self.run:
            problems.append("adapter and run: both name an adapter to go on from. Take one of them.")
        raise_collected(RecipeError, "The recipe cannot be used:", problems)
        return self

    @property
    def signature(self) -> signatures.Signature:
        """The loss's signature."""
        return signatures.find(self.method)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Every hyperparameter of the loss: as set here, else its default."""
        set_here = self.model_extra or {}
        return {name: set_here.get(name, h.default) for name, h in self.signature.hyperparameters.items()}

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate that was set, else the loss's own."""
        return self.learning_rate if self.learning_rate is not None else self.signature.learning_rate

    def resolved(self) -> dict[str, Any]:
        """Every setting, hyperparameters included, with its value: what a run saves and what reruns it."""
        return {**self.model_dump(), "learning_rate": self.peak_learning_rate, **self.hyperparameters}

    def save(self, path: Path) -> None:
        """Write every setting as YAML."""
        path.write_text(yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def load(path: Path | None = None, **overrides: Any) -> Recipe:
    """A recipe from a YAML file (or from defaults), with `overrides` on top. Raises RecipeError."""
    return Recipe(**{**(read_yaml(path) if path else {}), **overrides})


def read_yaml(path: Path) -> dict[str, Any]:
    """A flat YAML file as a dict; `1e-5` is a number. Raises RecipeError with the place."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}. Expected a recipe in YAML.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected `key: value` lines, found {type(values).__name__}.")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def unknown_key(key: str, method: str) -> str:
    """The message for a key that neither the recipe nor the loss knows, with the nearest one that exists."""
    known = [*Recipe.model_fields, *signatures.find(method).hyperparameters]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"{key}: no such setting of {method}." + (f" Did you mean {near[0]}?" if near else " See `lite {method} --help`.")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as a string, for want of a dot; here it is the number that was meant."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
