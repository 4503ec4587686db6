"""Steps of a training run, without a trainer around them: lite's, and the one that users of transformers + peft write.

And a trainer's own steps, TRL's. Each is a pair of random tokens, forward, backward, clipped, and the update.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from contenders import LORA
from material import random_rows
from measuring import Found
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from lite.data.examples import TokenExample
from lite.data.packing import lay_out
from lite.engine import optimizer as engine_optimizer
from lite.engine import step as engine_step
from lite.engine.layout import layout_of, path_of
from lite.engine.objective import Objective
from lite.engine.scalars import Scalars
from lite.model.attention import plain_attention
from lite.recipe import Recipe

Step = Callable[[], None]
BETA = 0.1


def lite_step(model: nn.Module, examples: list[TokenExample], recipe: Recipe) -> tuple[Step, torch.optim.Optimizer]:
    """lite's step under a recipe, and its optimizer."""
    scalars = Scalars.of(recipe, model.device)
    objective = Objective.of(recipe.signature, recipe.hyperparameters, scalars.values)
    batch, path = lay_out(examples, layout_of(recipe, model)), path_of(recipe)
    trained = [p for p in model.parameters() if p.requires_grad]
    update = engine_optimizer.optimizer(model, recipe, scalars)

    def step() -> None:
        engine_step.backward(model, batch, objective, path)
        clip_grad_norm_(trained, recipe.max_grad_norm, foreach=False)
        update.step()
        update.zero_grad()

    return step, update


def plain_step(model: nn.Module, example: TokenExample) -> tuple[Step, torch.optim.Optimizer]:
    """The same step as a user of transformers + peft writes it: a padded batch and whole logits; and its optimizer."""
    width, device = example.longest, model.device
    ids = torch.zeros(2, width, dtype=torch.long, device=device)
    mask = torch.zeros(2, width, dtype=torch.long, device=device)
    for row, completion in enumerate(example.completions):
        tokens = torch.tensor(example.prompt + completion, device=device)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    scored = mask[:, 1:].bool() & (torch.arange(1, width, device=device) >= len(example.prompt))
    trained = [p for p in model.parameters() if p.requires_grad]
    update = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        with plain_attention(model):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            logps = torch.log_softmax(logits.float(), -1).gather(2, ids[:, 1:, None]).squeeze(2)
            chosen, rejected = ((logps * scored).sum(1) / scored.sum(1)).unbind()
            odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
            (-chosen - BETA * F.logsigmoid(odds)).backward()
        clip_grad_norm_(trained, 1.0)
        update.step()
        update.zero_grad()

    return step, update


def trl_steps(model: PreTrainedModel, tokens: int, steps: int, watch: Any, *, checkpointed: bool, folder: str) -> None:
    """Let TRL's ORPO take so many steps of one pair of about `tokens` tokens; `watch` has `before` and `after`.

    TRL tokenises, so its rows are text whose tokens are a few more than asked for.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from lite.model.catalog import BUNDLED_MODEL

    class Watched(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            watch.before(trainer.model, trainer.optimizer)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            watch.after()

    on_cpu = model.device.type == "cpu"
    arguments = ORPOConfig(
        output_dir=folder, per_device_train_batch_size=1, max_steps=steps, learning_rate=1e-5, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=on_cpu, bf16=model.dtype == torch.bfloat16, max_length=2 * tokens,
        max_completion_length=tokens, gradient_checkpointing=checkpointed, disable_tqdm=True,
    )  # fmt: skip
    trainer = ORPOTrainer(
        model=model, args=arguments, processing_class=AutoTokenizer.from_pretrained(BUNDLED_MODEL),
        train_dataset=Dataset.from_list(random_rows(steps, tokens // 2, tokens // 4)), peft_config=LoraConfig(**LORA),
        callbacks=[Watched()],
    )  # fmt: skip
    trainer.train()


def pair_sizes(tokens: int) -> tuple[int, int, int]:
    """(prompt, chosen, rejected) of a pair of so many tokens: half prompt; completions alike, so none is padded."""
    return tokens - 2 * (tokens // 4), tokens // 4, tokens // 4


def found_out_of_memory(error: torch.OutOfMemoryError) -> Found:
    """What stopped a step, as a figure."""
    return {"out_of_memory": str(error).split(".")[0]}
