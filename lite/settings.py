"""Settings: the only place where a setting, its default, unit, range and help line are written.

Those of the loss are written in its own signature. A shorthand stands for several settings and is never stored.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

BUNDLED = "bundled"


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


class Settings(BaseModel):
    """Every setting that is not the loss's own."""

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

    full: bool = setting(False, "Train every weight of the blocks instead of an adapter.", panel="Full training")
    train_embeddings: bool = setting(
        False, "With full: the input embedding and the head as well.", panel="Full training"
    )
    int8_weights: bool = setting(
        False, "With GaLore: weights in 8 bits, a scale for every 128, rounded stochastically.", panel="Full training"
    )
    galore_rank: int = setting(
        128, "Rank of the subspace onto which a matrix's gradient is projected.", panel="Full training", ge=1
    )
    galore_scale: float = setting(
        0.25, "The update is multiplied by it as it is projected back.", panel="Full training", gt=0
    )
    galore_update_interval: int = setting(
        200, "A matrix's subspace is refreshed every so many steps.", panel="Full training", unit="steps", ge=1
    )
    galore_projection: Literal["sketch", "svd", "eigh", "random"] = setting(
        "sketch",
        "How a subspace is found: a seeded sketch of the gradients, SVD, eigenvectors of GGᵀ, chance.",
        panel="Full training",
    )
    galore_states: Literal["float32", "bfloat16", "8bit"] = setting(
        "8bit", "What the moments in the subspace are kept in.", panel="Full training"
    )
    galore_merge: Literal["step", "refresh"] = setting(
        "step", "When updates are rounded into the weights: at each step, or at refreshes.", panel="Full training"
    )
    galore_adaptive: bool = setting(
        False,
        "A subspace that stands still is refreshed half as often, then a quarter … (Q-GaLore).",
        panel="Full training",
    )
    galore_sketch_steps: int = setting(
        1, "Steps whose gradients a sketch sums.", panel="Full training", unit="steps", ge=1
    )
    vector_learning_rate: float | None = setting(
        None,
        "Peak rate of norms, biases and matrices smaller than the rank, under GaLore; "
        "without it learning_rate × galore_scale.",
        panel="Full training",
        gt=0,
    )

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
        None,
        "Peak learning rate; without it the loss's own, or with full and an AdamW a tenth of it.",
        panel="Training",
        gt=0,
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
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit", "galore", "galore-torch"] = setting(
        "adamw",
        "8bit: states in eight bits; paged: they may move to host memory; galore: in a subspace, with full.",
        panel="Training",
    )
    adam_beta1: float = setting(0.9, "Decay of the first moment.", panel="Training", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "Decay of the second moment.", panel="Training", ge=0, lt=1)
    adam_epsilon: float = setting(1e-8, "Added to the root of the second moment.", panel="Training", gt=0)
    seed: int = setting(
        42, "Of the order of rows, an adapter's start, dropout, sketches, rounding.", panel="Training", ge=0, lt=2**32
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
    keep_weights: bool | None = setting(
        None,
        "Recomputed layers keep what they dequantise from then until their backward, one layer at a time.",
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


class Shorthands(BaseModel):
    """What can be said for several settings at once."""

    galore: bool = setting(
        False, "Short for --full --optimizer galore: every weight, in an adapter's memory.", panel="Full training"
    )


STANDS_FOR: dict[str, dict[str, Any]] = {"galore": {"full": True, "optimizer": "galore"}}


def expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with each shorthand's settings in its place."""
    found = {key: value for key, value in values.items() if key not in STANDS_FOR}
    for word, settings in STANDS_FOR.items():
        found |= settings if values.get(word) is True else {}
    return found


def override(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values of both, those above instead of those below; so with a shorthand and what it stands for."""
    values = {**below, **above}
    for word, settings in STANDS_FOR.items():
        if above.get(word) is True:
            values = {key: value for key, value in values.items() if key in above or key not in settings}
            continue
        wrong_below = any(below.get(key, value) != value for key, value in settings.items())
        if values.get(word) is True and settings.keys() & above.keys() and not wrong_below:
            del values[word]
            values = {**settings, **values}
    return values
