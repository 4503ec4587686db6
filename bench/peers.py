"""One ORPO step of lite beside TRL's: the same rows, model, adapter and dtype, each in its own process.

    python bench/peers.py --out bench/results/peers-cpu.json        (pip install -e ".[bench]")

The model is made on the spot: Qwen3's architecture, 12 layers of 512, a vocabulary of 151,936, random weights. The
floor is the time that the matrix products and attentions of lite's own step take alone: they are recorded in a real
step and run again, in the same process. A second, small comparison takes the bundled trained model and puts the losses
of both side by side, lite's NLL taken over the sequence as TRL takes it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PAIR_ROWS, LORA_RANK = 2, 16
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS")  # make a CPU behave as a lesser one


def trl_child(work: Path, options: dict[str, Any]) -> dict[str, Any]:
    """TRL's ORPO as its documentation has it, with the same adapter on all linear layers."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds[-1] += time.perf_counter()

    dtype = getattr(torch, options["dtype"])
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=dtype)
    settings = ORPOConfig(
        output_dir=str(work / "trl"), per_device_train_batch_size=options["rows"], max_steps=options["steps"],
        learning_rate=1e-9, logging_steps=1, max_length=8192, max_completion_length=4096, report_to="none",
        bf16=options["dtype"] == "bfloat16", gradient_checkpointing=options["gradient_checkpointing"],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = ORPOTrainer(
        model=model, args=settings, processing_class=AutoTokenizer.from_pretrained(work / "model"),
        train_dataset=load_dataset("json", data_files=str(work / "rows.jsonl"), split="train"),
        peft_config=LoraConfig(r=LORA_RANK, lora_alpha=32, target_modules="all-linear"), callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return {"seconds": seconds, "losses": losses, "peak_bytes": peak_bytes()}


def lite_child(work: Path, options: dict[str, Any]) -> dict[str, Any]:
    """lite.train, and then the floor of one of its steps."""
    import lite

    recipe = lite.Recipe(
        method="orpo", model=str(work / "model"), data=str(work / "rows.jsonl"), eval_data=str(work / "held_out.jsonl"),
        chat_template="none", dtype=options["dtype"], device="cpu", batch_size=options["rows"],
        max_steps=options["steps"], learning_rate=1e-9, max_length=8192, samples=0,
        gradient_checkpointing=options["gradient_checkpointing"], nll_over=options["nll_over"], lora_r=LORA_RANK,
        save_steps=10**6, output_dir=str(work / "run"),
    )  # fmt: skip
    run = lite.train(recipe)
    outcome = {
        "seconds": [record["seconds"] for record in read_lines(run.folder / "speed.jsonl")],
        "losses": [record["loss"] for record in read_lines(run.folder / "metrics.jsonl") if "loss" in record],
        "peak_bytes": peak_bytes(),
    }
    if not options["floor"]:
        return outcome
    from floor import floor  # beside this file, which is run as a program

    return {**outcome, **floor(recipe)}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def peak_bytes() -> int:
    """High-water mark of this process's resident memory."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_model(folder: Path) -> None:
    """A random Qwen3 of 12 layers with the bundled tokenizer; its vocabulary is larger than the tokenizer's."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from lite.model.catalog import BUNDLED_MODEL

    config = Qwen3Config(
        vocab_size=151_936, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=False, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED_MODEL).save_pretrained(folder)


def bundled_rows(count: int) -> list[dict[str, str]]:
    """Rows of the bundled data as plain text, since TRL and lite end a chat's last turn differently."""
    from lite.bundled import FOLDER

    def text(value: Any) -> str:
        return value if isinstance(value, str) else value[-1]["content"]

    rows = read_lines(FOLDER / "train.jsonl")[:count]
    return [
        {"prompt": text(r["prompt"]), "chosen": f" {text(r['chosen'])}", "rejected": f" {text(r['rejected'])}"}
        for r in rows
    ]


def random_rows(count: int, prompt: int, completion: int) -> list[dict[str, str]]:
    """Rows of about so many tokens, out of the bundled data's words."""
    import random

    from transformers import AutoTokenizer

    from lite.model.catalog import BUNDLED_MODEL

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    words = " ".join(row["chosen"] for row in bundled_rows(1000)).split()
    draw = random.Random(0)

    def text(tokens: int) -> str:
        found: list[str] = []
        while len(tokenizer(" ".join(found)).input_ids) < tokens:
            found += draw.choices(words, k=5)
        return " ".join(found)

    return [
        {"prompt": text(prompt), "chosen": f" {text(completion)}", "rejected": f" {text(completion)}"}
        for _ in range(count)
    ]


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    """The rows to train on; the first of them is held out as well, so that none is taken away for evaluation."""
    for name, part in (("rows.jsonl", rows), ("held_out.jsonl", rows[:1])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))


def child(which: str, work: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, "--child", which, str(work), json.dumps(options)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    if done.returncode:
        raise SystemExit(f"{which} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    from importlib.metadata import version

    import torch

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in flags.splitlines() if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit, "cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "features": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in flags],
        "limited_by": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "trl")},
    }  # fmt: skip


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step, tokens a second and peak memory of both, on the random model."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model")
        write_rows(work, random_rows(PAIR_ROWS * options.steps, options.prompt, options.completion))
        settings = {"rows": PAIR_ROWS, "steps": options.steps, "dtype": options.dtype, "nll_over": "completion",
                    "gradient_checkpointing": options.gradient_checkpointing, "floor": True}  # fmt: skip
        found = {which: child(which, work, settings) for which in ("lite", "trl", "lite", "trl")[-options.sides :]}
    for side in found.values():
        side["step"] = statistics.median(side["seconds"][1:])  # the first step allocates and warms up
        side["tokens_per_second"] = found["lite"]["tokens"] / side["step"]
    ours, theirs = found["lite"], found["trl"]
    return found | {
        "speed_ratio": theirs["step"] / ours["step"],
        "memory_ratio": ours["peak_bytes"] / theirs["peak_bytes"],
        "share_of_floor": ours["floor_seconds"] / ours["step_seconds"],
    }


def parity(options: argparse.Namespace) -> dict[str, Any]:
    """The losses of the bundled trained model over the same rows, one a step, the weights standing still."""
    import shutil

    from lite.model.catalog import BUNDLED_MODEL

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copytree(BUNDLED_MODEL, work / "model")
        write_rows(work, bundled_rows(8))
        settings = {
            "rows": 1,
            "steps": 8,
            "dtype": options.dtype,
            "nll_over": "sequence",
            "gradient_checkpointing": False,
            "floor": False,
        }
        found = {which: statistics.mean(child(which, work, settings)["losses"]) for which in ("lite", "trl")}
    return found | {"relative_difference": abs(found["lite"] - found["trl"]) / found["trl"]}


def main() -> None:
    """Measure, print a table, save the figures."""
    if sys.argv[1:2] == ["--child"]:
        which, work, options = sys.argv[2:5]
        print(json.dumps({"lite": lite_child, "trl": trl_child}[which](Path(work), json.loads(options))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=500, help="tokens of a prompt, about")
    parser.add_argument("--completion", type=int, default=200, help="tokens of a completion, about")
    parser.add_argument("--steps", type=int, default=4, help="steps of each side, the first of which is not counted")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--sides", type=int, default=2, choices=(2, 4), help="4: each side twice, the later run counts")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "parity": parity(options),
        **speed(options),
    }
    for which in ("lite", "trl"):
        step, rate, peak = (result[which][key] for key in ("step", "tokens_per_second", "peak_bytes"))
        print(f"{which:5s} {step:7.2f} s/step  {rate:7.0f} tokens/s  {peak / 1e9:6.2f} GB")
    print(f"lite is {result['speed_ratio']:.1f} times as fast, in {result['memory_ratio']:.2f} of the memory")
    print(f"and runs at {result['share_of_floor']:.0%} of the floor of its own products")
    print(f"losses of the bundled model: lite {result['parity']['lite']:.5f}, TRL {result['parity']['trl']:.5f}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
