"""The contenders of peers.py: a training run of lite or of TRL, each in a process of its own.

    python bench/contenders.py lite-dpo FOLDER '{"rows": 2, "steps": 4, …}'

FOLDER holds model/, rows.jsonl and held_out.jsonl. The last line printed is a JSON object: seconds and cpu_seconds of
each step but the first, which allocates and warms up; every loss; the peak of resident memory from step 1 on; of DPO
how many rows the reference was asked for in this process.
"""

import itertools
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from measuring import Found, forget_peak, peak_bytes, read_lines

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
LEARNING_RATE = 1e-9  # the weights stand still, so that losses can be compared


def trl(work: Path, options: Found, method: str) -> Found:
    """TRL's trainer as its documentation has it, with the same adapter on all linear layers.

    DPO: reference precomputed into the cache of `datasets`; the fused head, which is its only one; no padding_free,
    which TRL 1.16 ignores with a warning.
    """
    import torch
    from datasets import load_dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            forget_peak()
            self.seconds: list[float] = []
            self.cpu: list[float] = [time.process_time()]

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(-time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds[-1] += time.perf_counter()
            self.cpu.append(time.process_time())

    clock, asked, dtype = Clock(), [0], getattr(torch, options["dtype"])
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=dtype)
    shared = {
        "model": model, "processing_class": AutoTokenizer.from_pretrained(work / "model"), "callbacks": [clock],
        "train_dataset": load_dataset("json", data_files=str(work / "rows.jsonl"), split="train"),
        "peft_config": LoraConfig(**LORA),
    }  # fmt: skip
    if options["adapter"]:
        adapted = PeftModel.from_pretrained(model, work / "adapter", is_trainable=True)
        ref_model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=dtype)
        shared |= {"model": adapted, "peft_config": None, "ref_model": ref_model}
    trainer = _trainer(method, shared, _settings(work, options), asked)
    trainer.train()
    data, losses = trainer.train_dataset, [r["loss"] for r in trainer.state.log_history if "loss" in r]
    columns = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in data.column_names]
    return {
        **_timed(clock.seconds, clock.cpu), "losses": losses, "peak_bytes": peak_bytes(), "reference_rows": asked[0],
        **({name: list(data[name]) for name in columns} if options["adapter"] else {}),
    }  # fmt: skip


def _settings(work: Path, options: Found) -> Found:
    return {
        "output_dir": str(work / "trl"), "per_device_train_batch_size": options["rows"], "max_steps": options["steps"],
        "learning_rate": LEARNING_RATE, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True,
        "bf16": options["dtype"] == "bfloat16", "gradient_checkpointing": options["gradient_checkpointing"],
        "disable_tqdm": True,
    }  # fmt: skip


def _trainer(method: str, shared: Found, settings: Found, asked: list[int]) -> Any:
    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer(args=ORPOConfig(max_length=8192, max_completion_length=4096, **settings), **shared)
    from trl import DPOConfig, DPOTrainer

    class Counted(DPOTrainer):
        def compute_ref_log_probs(self, model: Any, inputs: Found) -> Any:
            asked[0] += len(inputs["input_ids"]) // 2
            return super().compute_ref_log_probs(model, inputs)

    # Without max_length nothing is cut here, and only then does a second process find the reference in the cache.
    return Counted(args=DPOConfig(max_length=None, precompute_ref_log_probs=True, **settings), **shared)


def lite(work: Path, options: Found, method: str) -> Found:
    """lite.train, and then, if asked for, the floor of one of its steps."""
    import lite
    from lite.train.progress import Quiet

    class Clock(Quiet):
        cpu: list[float]
        found_line = ""

        def note(self, message: str) -> None:
            if message.startswith("reference: "):
                self.found_line = message

        def steps(self, total: int, done: int) -> None:
            forget_peak()
            self.cpu = [time.process_time()]

        def step(self, step: int, metrics: Any) -> None:
            self.cpu.append(time.process_time())

    of_method: Found = {"nll_over": options["nll_over"]} if method == "orpo" else {"cache": str(work / "cache")}
    adapter: Found = {"lora_r": LORA["r"], "lora_alpha": float(LORA["lora_alpha"])}
    if options["adapter"]:
        adapter = {"adapter": str(work / "adapter")}
        of_method |= {"ref_columns": True} if options["ref_columns"] else {"ref": str(work / "model")}
    recipe = lite.Recipe(
        method=method, model=str(work / "model"), data=str(work / "rows.jsonl"), eval_data=str(work / "held_out.jsonl"),
        chat_template="none", dtype=options["dtype"], device="cpu", batch_size=options["rows"],
        max_steps=options["steps"], learning_rate=LEARNING_RATE, max_length=8192, samples=0, save_steps=10**6,
        recompute_layers=10_000 if options["gradient_checkpointing"] else 0,
        output_dir=str(work / f"run-{os.getpid()}"),
        **adapter, **of_method,
    )  # fmt: skip
    clock = Clock()
    run = lite.train(recipe, clock)
    outcome = {
        **_timed([record["seconds"] for record in read_lines(run.folder / "speed.jsonl")], clock.cpu),
        "losses": [record["loss"] for record in read_lines(run.folder / "metrics.jsonl") if "loss" in record],
        "peak_bytes": peak_bytes(),
        "reference_rows": int((re.findall(r"(\d+) rows computed", clock.found_line) or [0])[0]),
    }
    if not options["floor"]:
        return outcome
    from floor import floor

    return {**outcome, **floor(recipe)}


def _timed(seconds: list[float], cpu_marks: list[float]) -> Found:
    """Of every step but the first, which allocates and warms up; between two marks lies a step with its logging."""
    cpu = [after - before for before, after in itertools.pairwise(cpu_marks)]
    return {"seconds": seconds[1:], "cpu_seconds": cpu[1:]}


if __name__ == "__main__":
    name, folder, given = sys.argv[1:4]
    side, _, loss = name.partition("-")
    print(json.dumps({"lite": lite, "trl": trl}[side](Path(folder), json.loads(given), loss)))
