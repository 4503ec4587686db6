"""Steps of a training run, without a trainer around them: lite's, and the one that users of transformers + peft write.

And a trainer's own steps, TRL's. Each is a pair of random tokens, forward, backward, clipped, and the update.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from contenders import LORA
from material import random_rows
from measuring import Found
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from lite.data.examples import TokenExample
from lite.data.packing import lay_out
from lite.engine import optimizer as engine_optimizer
from lite.engine import step as engine_step
from lite.engine.layout import layout_of, path_of
from lite.engine.objective import Objective
from lite.engine.scalars import Scalars
from lite.memory import marks
from lite.plan.lengths import Nothing
from lite.recipe import Recipe

Step = Callable[[], None]
BETA = 0.1


def lite_step(model: nn.Module, examples: list[TokenExample], recipe: Recipe) -> tuple[Step, torch.optim.Optimizer]:
    """lite's step under a recipe, and its optimizer; what a reference says of the examples is given, as by a cache."""
    scalars = Scalars.of(recipe, model.device)
    objective = Objective.of(recipe.signature, recipe.hyperparameters, scalars.values)
    batch = lay_out(examples, layout_of(recipe, model), reference=Nothing()).pinned(model.device)
    path = path_of(recipe)
    trained = [p for p in model.parameters() if p.requires_grad]
    update = engine_optimizer.optimizer(model, recipe, scalars)

    def step() -> None:
        engine_step.backward(model, batch, objective, path)
        marks.phase("update")
        engine_optimizer.clip(update, trained, recipe.max_grad_norm)
        update.step()
        update.zero_grad()
        marks.phase("idle")

    return step, update


def plain_step(model: nn.Module, example: TokenExample, method: str = "orpo") -> tuple[Step, torch.optim.Optimizer]:
    """The same step as a user of transformers + peft writes it: a padded batch and whole logits; and its optimizer.

    method: `orpo`; `dpo`, the reference's log-probs given; or `sft`, of an example's only completion.
    """
    width, device, rows = example.longest, model.device, len(example.completions)
    ids = torch.zeros(rows, width, dtype=torch.long, device=device)
    mask = torch.zeros(rows, width, dtype=torch.long, device=device)
    for row, completion in enumerate(example.completions):
        tokens = torch.tensor(example.prompt + completion, device=device)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    scored = mask[:, 1:].bool() & (torch.arange(1, width, device=device) >= len(example.prompt))
    trained = [p for p in model.parameters() if p.requires_grad]
    update = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        marks.phase("forward")
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        marks.phase("head")
        logps = torch.log_softmax(logits.float(), -1).gather(2, ids[:, 1:, None]).squeeze(2) * scored
        loss = _LOSSES[method](logps.sum(1), scored.sum(1))
        del logits, logps
        marks.phase("backward")
        loss.backward()
        marks.phase("update")
        clip_grad_norm_(trained, 1.0)
        update.step()
        update.zero_grad()
        marks.phase("idle")

    return step, update


def _orpo(totals: Tensor, lengths: Tensor) -> Tensor:
    chosen, rejected = (totals / lengths).unbind()
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -chosen - BETA * F.logsigmoid(odds)


def _dpo(totals: Tensor, lengths: Tensor) -> Tensor:
    reference = torch.zeros(2, device=totals.device)
    chosen, rejected = (totals - reference).unbind()
    return -F.logsigmoid(BETA * (chosen - rejected))


def _sft(totals: Tensor, lengths: Tensor) -> Tensor:
    return -totals.sum() / lengths.sum()


_LOSSES = {"orpo": _orpo, "dpo": _dpo, "sft": _sft}


def trl_steps(
    model: PreTrainedModel, size: Sequence[int], steps: int, watch: Any, *, checkpointed: bool, folder: str,
    method: str = "orpo",
) -> None:  # fmt: skip
    """Let TRL's ORPO or DPO take so many steps of one pair of about these tokens; `watch` has `before` and `after`.

    size: of prompt, chosen, rejected. TRL tokenises, so its rows are text whose tokens are a few more than asked for.
    DPO's reference is computed before the first step.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback

    from lite.model.catalog import BUNDLED_MODEL

    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer

        lengths = {"max_length": 2 * sum(size), "max_completion_length": 2 * max(size[1:])}
    else:
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer

        lengths = {"max_length": None, "precompute_ref_log_probs": True}

    class Watched(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            watch.before(trainer.model, trainer.optimizer)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            watch.after()

    on_cpu = model.device.type == "cpu"
    arguments = Config(
        output_dir=folder, per_device_train_batch_size=1, max_steps=steps, learning_rate=1e-5, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=on_cpu, bf16=model.dtype == torch.bfloat16,
        gradient_checkpointing=checkpointed, disable_tqdm=True, **lengths,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, processing_class=AutoTokenizer.from_pretrained(BUNDLED_MODEL),
        train_dataset=Dataset.from_list(random_rows(steps, size[0], max(size[1:]))), peft_config=LoraConfig(**LORA),
        callbacks=[Watched()],
    )  # fmt: skip
    trainer.train()


def pair_sizes(tokens: int) -> tuple[int, int, int]:
    """(prompt, chosen, rejected) of a pair of so many tokens: half prompt; completions alike, so none is padded."""
    return tokens - 2 * (tokens // 4), tokens // 4, tokens // 4


def found_out_of_memory(error: torch.OutOfMemoryError) -> Found:
    """What stopped a step, as a figure."""
    return {"out_of_memory": str(error).split(".")[0]}
