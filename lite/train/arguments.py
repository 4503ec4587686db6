"""The recipe in the words of transformers' Trainer."""

from pathlib import Path

import torch
from transformers import TrainingArguments

from lite.recipe import Recipe
from lite.train import trackers


def arguments(recipe: Recipe, folder: Path, steps: int, *, device: torch.device, evaluates: bool) -> TrainingArguments:
    """What Trainer is told. Nothing here can switch on autocast, a gradient scaler or DataParallel."""
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,  # packs are accumulated inside the step, with the exact normaliser
        learning_rate=recipe.peak_learning_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        bf16=False,
        fp16=False,
        logging_strategy="steps",
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,  # it would put the mean of earlier losses in the place of a NaN
        eval_strategy="steps" if recipe.eval_steps and evaluates else "no",
        eval_steps=recipe.eval_steps,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        report_to=trackers.named(recipe) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
    )
    # With two GPUs in sight Trainer wraps the model in DataParallel, which splits a batch that is not a tensor.
    made._n_gpu = min(made.n_gpu, 1)
    return made
