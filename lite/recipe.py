"""Recipe: the only place where a setting, its default, unit, range and help line are written.

A recipe is flat. Beside the fields below it carries the hyperparameters of its loss (`beta: 0.1`), which the loss's
signature owns; `recipe.hyperparameters` is all of them, set or default. Precedence: defaults < file < flags.
"""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from lite import flat_yaml, hyperparameters, signatures
from lite.errors import RecipeError, raise_collected
from lite.flat_yaml import read as read_yaml
from lite.misfits import Problem, misfits

__all__ = [
    "BUNDLED",
    "HEADLINE",
    "Problem",
    "Recipe",
    "expected",
    "load",
    "planned_settings",
    "problems",
    "read_yaml",
    "setting",
]

BUNDLED = "bundled"
HEADLINE = "The recipe cannot be used:"


def setting(
    default: Any,
    description: str,
    *,
    panel: str,
    unit: str = "",
    flag: str = "",
    planned: bool = False,
    **limits: Any,
) -> Any:
    """A field of the recipe; `panel` groups the help, `unit` ends its line, `flag` is a shorter name for it.

    planned: where it is None, the plan of the run chooses it.
    """
    extra = {"panel": panel, "unit": unit, "flag": flag, "planned": planned}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class Recipe(BaseModel):
    """Every setting of a run. Raises RecipeError naming each wrong key and value at once."""

    model_config = ConfigDict(
        extra="allow", frozen=True, strict=True, allow_inf_nan=False, validate_default=False, protected_namespaces=()
    )

    method: str = setting("orpo", "The loss: a registered one, or file.py:function.", panel="Method")
    loss: str | None = setting(
        None, "Losses to sum, the verb's among them: dpo:1.0,sft:0.2; then --dpo.beta and so on.", panel="Method"
    )

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
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Where to train; auto takes a GPU if there is one.", panel="Model"
    )
    attn_implementation: Literal["auto", "flash", "varlen", "sdpa", "eager", "padded"] = setting(
        "auto", "Attention over packs; padded gives packs up and pads each completion alone.", panel="Model"
    )

    lora_r: int = setting(16, "Rank of the adapter.", panel="Adapter", ge=1)
    lora_alpha: float = setting(
        32.0, "Scale of the adapter: its update is multiplied by alpha / r.", panel="Adapter", gt=0
    )
    lora_dropout: float = setting(0.0, "Dropout on the adapter's input.", panel="Adapter", ge=0, lt=1)
    lora_target_modules: str = setting(
        "all-linear",
        "Names of the adapted layers, comma-separated; all-linear: every one in the blocks.",
        panel="Adapter",
    )
    use_rslora: bool = setting(False, "Scale by alpha / √r (rank-stabilised LoRA).", panel="Adapter")
    use_dora: bool = setting(False, "Train magnitude and direction apart (DoRA).", panel="Adapter")
    adapter: str | None = setting(None, "Folder of an adapter to go on from.", panel="Adapter")
    run: str | None = setting(None, "Finished run whose adapter to go on from.", panel="Adapter")

    ref: str | None = setting(
        None, "Another model as the reference: a folder, hub name or alias; without it the start.", panel="Reference"
    )
    ref_adapter: str | None = setting(None, "Folder of an adapter on --ref.", panel="Reference")
    ref_load_in_4bit: bool = setting(False, "Quantise --ref to NF4.", panel="Reference", flag="--ref-4bit")
    ref_columns: bool = setting(
        False, "Take the data's own ref_chosen_logps and ref_rejected_logps as they are.", panel="Reference"
    )
    refresh_reference: int | None = setting(
        None, "The policy becomes the reference every so many steps (TR-DPO).", panel="Reference", unit="steps", ge=1
    )
    top_k: int = setting(
        64,
        "Words of the reference's distribution kept for each token, by a loss that learns from it.",
        panel="Reference",
        ge=1,
    )
    cache: str | None = setting(
        None, "Folder of the reference's log-probs; without it the user's cache folder.", panel="Reference"
    )

    data: str = setting(BUNDLED, "JSONL, JSON, CSV or Parquet file, or `-` for JSONL on stdin.", panel="Data")
    eval_data: str | None = setting(
        None, "Held-out rows; without it min(5 %, 200) rows, chosen by content.", panel="Data"
    )
    format: str | None = setting(None, "Row layout; without it the one whose keys match best.", panel="Data")
    columns: dict[str, str] = setting({}, "Your names of the columns: prompt=question,chosen=good.", panel="Data")
    chat_template: str = setting("auto", "auto: the model's own; none: plain text; or a Jinja file.", panel="Data")
    max_length: int = setting(2048, "Longest prompt and completion together.", panel="Data", unit="tokens", ge=8)
    skip_bad_rows: bool = setting(False, "Go on without unreadable rows; they are listed in the run.", panel="Data")
    safety: float = setting(
        0.0, "Extra weight of pairs whose rejected completion is marked `unsafe`.", panel="Data", ge=0
    )
    allow_dropped: bool = setting(False, "Go on though more than 5 % of the rows are too long.", panel="Data")

    num_train_epochs: float = setting(1.0, "Passes over the data.", panel="Training", gt=0)
    max_steps: int | None = setting(None, "Stop after so many optimizer steps.", panel="Training", unit="steps", ge=1)
    batch_size: int = setting(16, "Examples per optimizer step, however they are laid out.", panel="Training", ge=1)
    learning_rate: float | None = setting(
        None, "Peak learning rate; without it the loss's own.", panel="Training", gt=0
    )
    scalar_learning_rate: float = setting(
        1e-2, "Peak rate of the loss's own trained numbers, such as gamma_dpo's gamma.", panel="Training", gt=0
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = setting(
        "cosine", "Course of the learning rate; constant has no warm-up.", panel="Training"
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
    seed: int = setting(
        42, "Of the order of the rows, the adapter's start and dropout.", panel="Training", ge=0, lt=2**32
    )

    vram: str | None = setting(
        None,
        "Memory of the card, such as 24GB: the plan stays within it; without it that of this machine.",
        panel="Memory",
    )
    force: bool = setting(False, "Train though the plan says that it does not fit.", panel="Memory")
    tokens_per_pack: int | None = setting(
        None,
        "Most tokens of one forward; a longer example is alone.",
        panel="Memory",
        planned=True,
        unit="tokens",
        ge=8,
    )
    split_pairs: bool | None = setting(
        None, "A pair over tokens_per_pack is computed one completion at a time, exactly.", panel="Memory", planned=True
    )
    chunk_tokens: int | None = setting(
        None, "Scored tokens whose logits exist at once.", panel="Memory", planned=True, unit="tokens", ge=1
    )
    recompute_layers: int | None = setting(
        None,
        "So many layers keep their input only and are computed again in backward.",
        panel="Memory",
        planned=True,
        ge=0,
    )
    keep_attention: bool | None = setting(
        None,
        "Recomputed layers keep what attention gave, which is then not computed again.",
        panel="Memory",
        planned=True,
    )
    offload_checkpoints: bool | None = setting(
        None, "The inputs of recomputed layers wait in host memory.", panel="Memory", planned=True
    )
    embedding_on_host: bool | None = setting(
        None, "The input embedding lies in host memory.", panel="Memory", planned=True
    )
    mlp_tile_tokens: int | None = setting(
        None,
        "The MLP of a layer takes so many tokens at a time; 0: all.",
        panel="Memory",
        planned=True,
        unit="tokens",
        ge=0,
    )
    layers_on_host: int | None = setting(
        None, "So many frozen layers lie in host memory and visit the card in turn.", panel="Memory", planned=True, ge=0
    )

    output_dir: str | None = setting(None, "The run folder; without it runs/METHOD-MODEL-TIME.", panel="Run")
    logging_steps: int = setting(1, "A line of metrics every so many steps.", panel="Run", unit="steps", ge=1)
    eval_steps: int | None = setting(
        None, "Evaluate every so many steps, beside before and after.", panel="Run", unit="steps", ge=1
    )
    save_steps: int = setting(50, "A checkpoint every so many steps.", panel="Run", unit="steps", ge=1)
    save_total_limit: int = setting(2, "Checkpoints kept, the newest.", panel="Run", ge=1)
    samples: int = setting(3, "Held-out prompts answered before and after training.", panel="Run", ge=0)
    report_to: str = setting("none", "Trackers, comma-separated: wandb, tensorboard, mlflow …", panel="Run")
    self_check: bool = setting(True, "Compare the fast path with the plain model before step 1.", panel="Run")

    def __init__(self, **values: Any) -> None:
        values = {key: str(value) if isinstance(value, PurePath) else value for key, value in values.items()}
        found = misfits(values, Recipe.model_fields)
        try:
            super().__init__(**values)
        except ValidationError as error:
            found = [*_wrong_values(error), *found]
        raise_collected(RecipeError, HEADLINE, [problem.key + problem.text for problem in found])

    def __eq__(self, other: object) -> bool:
        """Recipes are equal if they make the same run; one may state what the other leaves to defaults."""
        return isinstance(other, Recipe) and self.resolved() == other.resolved()

    __hash__ = None  # type: ignore[assignment]

    @property
    def signature(self) -> signatures.Signature:
        """The loss's signature."""
        return signatures.find(self.method, self.loss)

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
        warmup = {"warmup_ratio": 0.0} if self.lr_scheduler_type == "constant" else {}
        return {**self.model_dump(), "learning_rate": self.peak_learning_rate, **warmup, **self.hyperparameters}

    def save(self, path: Path) -> None:
        """Write every setting as YAML."""
        path.write_text(flat_yaml.dump(self.resolved()), encoding="utf-8")


def planned_settings() -> tuple[str, ...]:
    """The settings that the plan of a run chooses where they are None."""
    return tuple(key for key, field in Recipe.model_fields.items() if field.json_schema_extra["planned"])


def problems(values: Mapping[str, Any]) -> list[Problem]:
    """Everything for which `Recipe(**values)` would raise, so that a caller can name each setting as the user did."""
    try:
        BaseModel.__init__(Recipe.__new__(Recipe), **values)
    except ValidationError as error:
        return [*_wrong_values(error), *misfits(values, Recipe.model_fields)]
    return misfits(values, Recipe.model_fields)


def load(path: Path | None = None, **overrides: Any) -> Recipe:
    """A recipe from a YAML file (or from defaults), with `overrides` on top. Raises RecipeError."""
    return Recipe(**{**(read_yaml(path) if path else {}), **overrides})


def expected(field: FieldInfo) -> str:
    """What a field takes, in words: `a whole number, at least 1`."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    kind = kinds[0] if type(None) in get_args(field.annotation) else field.annotation
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    words = [hyperparameters.WORDS.get(kind, "pairs such as prompt=question (in a recipe, `prompt: question`)")]
    for limit in field.metadata:
        for name, word in (("ge", "at least"), ("gt", "above"), ("lt", "below"), ("le", "at most")):
            if hasattr(limit, name):
                words.append(f"{word} {getattr(limit, name)}")
    return ", ".join(words)


def _wrong_values(error: ValidationError) -> list[Problem]:
    """Each value of the wrong type or out of its range, once."""
    found = {}
    for detail in error.errors():
        key = str(detail["loc"][0])
        found.setdefault(key, Problem(key, f" = {detail['input']!r}: expected {expected(Recipe.model_fields[key])}."))
    return list(found.values())
