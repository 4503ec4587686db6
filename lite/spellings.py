"""What a misspelt word was probably meant to be, and what lite calls the settings of other programs.

Both only ever end an error message: a foreign name is never accepted in place of lite's own.
"""

from collections.abc import Iterable
from difflib import SequenceMatcher

# The words of TRL, LLaMA-Factory, ms-swift and Axolotl where lite's word is another.
FOREIGN = {
    "model_name_or_path": "model",
    "base_model": "model",
    "model_id": "model",
    "model_revision": "revision",
    "torch_dtype": "dtype",
    "bf16": "dtype",
    "fp16": "dtype",
    "quantization_bit": "load_in_4bit",
    "quant_bits": "load_in_4bit",
    "attn_impl": "attn_implementation",
    "flash_attn": "attn_implementation",
    "flash_attention": "attn_implementation",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
    "adapter_name_or_path": "adapter",
    "adapters": "adapter",
    "lora_model_dir": "adapter",
    "dataset": "data",
    "datasets": "data",
    "dataset_name": "data",
    "train_file": "data",
    "eval_dataset": "eval_data",
    "val_dataset": "eval_data",
    "test_datasets": "eval_data",
    "template": "chat_template",
    "chat_template_path": "chat_template",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "max_prompt_length": "max_length",
    "max_completion_length": "max_length",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "warmup_steps": "warmup_ratio",
    "max_norm": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "optim": "optimizer",
    "use_galore": "galore",
    "full_finetuning": "full",
    "full_finetune": "full",
    "additional_target": "train_embeddings",
    "modules_to_save": "train_embeddings",
    "galore_with_embedding": "train_embeddings",
    "galore_quantization": "int8_weights",
    "use_qgalore": "int8_weights",
    "qgalore_rank": "galore_rank",
    "qgalore_scale": "galore_scale",
    "qgalore_update_proj_gap": "galore_update_interval",
    "galore_update_proj_gap": "galore_update_interval",
    "update_proj_gap": "galore_update_interval",
    "galore_proj_type": "galore_projection",
    "qgalore_proj_type": "galore_projection",
    "proj_type": "galore_projection",
    "galore_cos_threshold": "galore_adaptive",
    "galore_gamma_proj": "galore_adaptive",
    "galore_queue_size": "galore_adaptive",
    "packing_length": "tokens_per_pack",
    "gradient_checkpointing": "recompute_layers",
    "use_gradient_checkpointing": "recompute_layers",
    "disable_gradient_checkpointing": "recompute_layers",
    "activation_offloading": "offload_checkpoints",
    "activation_cpu_offload": "offload_checkpoints",
    "layer_offloading": "layers_on_host",
    "offload_layers": "layers_on_host",
    "tiled_mlp": "mlp_tile_tokens",
    "unsloth_tiled_mlp": "mlp_tile_tokens",
    "output": "output_dir",
    "random_state": "seed",
    "4bit": "load_in_4bit",
    "8bit": "load_in_8bit",
    "pref_beta": "beta",
    "orpo_alpha": "beta",
    "orpo_beta": "beta",
    "simpo_beta": "beta",
    "rl_beta": "beta",
    "cpo_alpha": "alpha",
    "simpo_gamma": "gamma",
    "simpo_gamma_beta_ratio": "gamma",
    "dpo_beta": "beta",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "kto_desirable_weight": "desirable_weight",
    "kto_undesirable_weight": "undesirable_weight",
    "dpo_label_smoothing": "label_smoothing",
    "cdpo_label_smoothing": "label_smoothing",
    "f_divergence_type": "f_divergence",
    "f_alpha_divergence_coef": "f_alpha",
    "discopop_tau": "temperature",
    "pref_ftx": "loss",
    "loss_weights": "loss",
    "dpo_loss_weights": "loss",
    "ref_model": "ref",
    "ref_model_name_or_path": "ref",
    "teacher_model": "ref",
    "teacher_model_name_or_path": "ref",
    "ref_adapters": "ref_adapter",
    "ref_model_adapters": "ref_adapter",
    "ref_model_quantization_bit": "ref_load_in_4bit",
    "precompute_ref_batch_size": "tokens_per_pack",
    "ref_model_sync_steps": "refresh_reference",
    "sync_ref_model": "refresh_reference",
}


# Their words for what is no setting here, and what to do.
ELSEWHERE = {
    "loss_type": "the verb names the loss: lite ipo, lite kto, lite dpo --variant hinge",
    "dpo_loss_type": "the verb names the loss: lite ipo, lite kto, lite dpo --variant hinge",
    "pref_loss": "the verb names the loss: lite orpo, lite kto, lite simpo",
    "rpo_alpha": "lite rpo --alpha",
    "ld_alpha": "lite ld_dpo --alpha",
    "use_weighting": "lite wpo",
    "reference_free": "lite cpo, or lite simpo",
    "precompute_ref_log_probs": "it is always so; lite precompute does it ahead",
    "force_use_ref_model": "the reference is read before training and is not in memory with it",
    "ref_model_mixup_alpha": "--refresh-reference takes the whole policy, not a mixture",
    "resume_from_checkpoint": "lite resume RUN",
    "max_samples": "--max-steps ends a run early; a shorter file has fewer rows",
    "val_size": "--eval-data FILE; without it min(5 %, 200) rows are held out",
    "gamma_beta_ratio": "lite simpo --gamma, which is beta times this",
    "padding_free": "nothing is ever padded",
    "packing": "rows are always packed",
    "use_liger_kernel": "its kernel is used where it is installed and there is a GPU",
    **dict.fromkeys(
        ("use_peft", "finetuning_type", "train_type", "tuner_type", "sft_type"),
        "an adapter is trained; with --full, or --galore, every weight",
    ),
    **dict.fromkeys(
        ("galore_layerwise", "galore_optim_per_parameter"),
        "each gradient is projected as it arises, and is still accumulated and clipped by its norm over all layers",
    ),
    **dict.fromkeys(
        ("galore_target", "galore_target_modules", "optim_target_modules"),
        "every matrix of the blocks is projected; with --train-embeddings, the embedding and the head too",
    ),
    **dict.fromkeys(
        ("use_apollo", "use_badam", "use_adam_mini"), "--galore trains every weight in the memory of an adapter"
    ),
    "optim_args": "each is a setting of its own: --galore-rank, --galore-scale, --galore-update-interval",
    "pure_bf16": "--galore keeps weights in --dtype bfloat16 alone, and rounds updates into them stochastically",
    "deepspeed": "lite trains in one process, on one GPU",
    "auto_find_batch_size": "the planner finds what fits; lite plan shows it",
    "do_train": "the verb trains",
    "do_eval": "held-out rows are evaluated before, at each checkpoint and after",
}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, if any is at all like it; of two equally like it, that with its first letter."""

    def likeness(candidate: str) -> float:
        return SequenceMatcher(None, word, candidate).ratio()

    ranked = sorted(known, key=lambda known_word: (likeness(known_word), known_word[:1] == word[:1]), reverse=True)
    return ranked[0] if ranked and likeness(ranked[0]) >= 0.6 else None


def elsewhere(word: str) -> str | None:
    """What to do instead of a setting of other programs that lite has not, as a sentence."""
    return f"Instead: {ELSEWHERE[word]}." if word in ELSEWHERE else None


def foreign(word: str, known: Iterable[str]) -> str | None:
    """What lite calls the setting that other programs call `word`, if it is among `known`."""
    ours = FOREIGN.get(word)
    return ours if ours in set(known) else None
