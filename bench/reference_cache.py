"""What each change of a run costs in rows of the reference computed again: lite beside TRL 1.16.

    python bench/reference_cache.py --out bench/results/reference-cache.json

Each run is a new process with the same folders for caches and output, after one with the same rows and the settings
of PLAIN. lite's rows are those that lite.precompute reports. TRL's are counted where its DPOTrainer, which has
precompute_ref_log_probs, asks the reference; that is while it is made, so it need not train. TRL comes twice: with its
default max_length, and without one, for with one every field of its configuration decides over the cache. The model is
the tiny bundled one: counts depend on no clock.

The kill: rows of which none is in the cache, a pack or batch taking as long as on a larger model (it sleeps); SIGKILL
midway; then once more. What counts is what was computed twice, in the worst of some kills.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from material import bundled_rows, copy_bundled_model
from measuring import Found, child, command, machine, save

KILLS = 3
BATCH, SLEEP_S = 8, 1.0  # rows, and seconds that a pack or batch takes at least where it is killed
# By the name in the table, the settings that differ from the run before.
CHANGES: dict[str, Found] = {
    "nothing": {},
    "learning_rate": {"learning_rate": 3e-6},
    "beta": {"beta": 0.3},
    "loss: dpo to ipo": {"loss": "ipo"},
    "lora r": {"r": 32},
    "seed": {"seed": 7},
    "batch size": {"batch_size": 4},
}
PLAIN: Found = {"learning_rate": 1e-6, "beta": 0.1, "loss": "dpo", "r": 16, "seed": 42, "batch_size": BATCH,
                "max_length": 1024, "kill_after": None, "sleep_s": 0.0}  # fmt: skip
SIDES = {"lite": {}, "trl": {}, "trl without max_length": {"max_length": None}}


def lite(work: Path, asked: Found) -> Found:
    """Rows that lite.precompute computed."""
    import lite
    from lite.train.progress import Quiet

    class Killer(Quiet):
        def rows(self, done: int, total: int) -> None:
            time.sleep(asked["sleep_s"])
            note(work, done)
            if asked["kill_after"] and done >= asked["kill_after"]:
                os.kill(os.getpid(), signal.SIGKILL)

    recipe = lite.Recipe(
        method=asked["loss"], model=str(work / "model"), data=str(work / "rows.jsonl"), cache=str(work / "cache"),
        chat_template="none", dtype="float32", device="cpu", batch_size=asked["batch_size"], lora_r=asked["r"],
        learning_rate=asked["learning_rate"], beta=asked["beta"], seed=asked["seed"], max_length=asked["max_length"],
        tokens_per_pack=asked["tokens_per_pack"], output_dir=str(work / "output"),
    )  # fmt: skip
    return {"computed": lite.precompute(recipe, Killer())["computed"]}


def trl(work: Path, asked: Found) -> Found:
    """Rows that TRL's trainer asked the reference for."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    count = 0

    class Counted(DPOTrainer):
        def compute_ref_log_probs(self, model: Any, inputs: Found) -> Any:
            nonlocal count
            found = super().compute_ref_log_probs(model, inputs)
            count += len(inputs["input_ids"]) // 2
            time.sleep(asked["sleep_s"])
            note(work, count)
            if asked["kill_after"] and count >= asked["kill_after"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

    settings = DPOConfig(
        output_dir=str(work / "output"), precompute_ref_log_probs=True, per_device_train_batch_size=asked["batch_size"],
        learning_rate=asked["learning_rate"], beta=asked["beta"], seed=asked["seed"], max_length=asked["max_length"],
        loss_type={"dpo": "sigmoid", "ipo": "ipo"}[asked["loss"]], report_to="none", use_cpu=True, bf16=False,
    )  # fmt: skip
    Counted(
        model=AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32), args=settings,
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
        train_dataset=load_dataset("json", data_files=str(work / "rows.jsonl"), split="train"),
        peft_config=LoraConfig(r=asked["r"], target_modules="all-linear"),
    )  # fmt: skip
    return {"computed": count}


def note(work: Path, done: int) -> None:
    """Rows done so far, where they outlive the process."""
    (work / "done").write_text(str(done))


def computed(side: str, work: Path, **changes: Any) -> int:
    """Rows of the reference that one run of a side computed, in a process of its own; also if it was killed."""
    asked = PLAIN | SIDES[side] | {"tokens_per_pack": 8192} | changes
    if side == "lite":
        asked["max_length"] = asked["max_length"] or 1024
    note(work, 0)
    arguments = ["--child", side.split()[0], str(work), json.dumps(asked)]
    try:
        return child(Path(__file__), arguments, {"HF_DATASETS_CACHE": str(work / "datasets")})["computed"]
    except SystemExit:
        if not asked["kill_after"]:
            raise
        return int((work / "done").read_text())


def costs(side: str, count: int) -> Found:
    """By change, the rows that a side computes again; of the kills the worst, and each beside the rows done by then."""
    rows = bundled_rows(count + 1)
    first, more = rows[:count], rows[count:]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        copy_bundled_model(work / "model")
        write(work, first)
        assert computed(side, work) == count
        found: Found = {name: computed(side, work, **changes) for name, changes in CHANGES.items()}
        write(work, [*first, *more])
        found["one row appended"] = computed(side, work)
        write(work, [*first[::2], *first[1::2]])
        found["rows shuffled"] = computed(side, work)
        kills = [killed(side, work, first[: count // 2], number) for number in range(KILLS)]
    return found | {"kill -9 midway": max(again for _, again in kills), "kills": kills}


def killed(side: str, work: Path, rows: list[Found], number: int) -> tuple[int, int]:
    """Rows done when a run over rows new to the cache was killed, and how many of them the next run computed again.

    The kill comes some packs after half of the rows, as many as its number, so that not all fall on a commit.
    """
    write(work, [row | {"prompt": f"{number + 1}. {row['prompt']}"} for row in rows])
    slowly = {"sleep_s": SLEEP_S, "tokens_per_pack": 45 * BATCH}
    done = computed(side, work, kill_after=len(rows) // 2 + number * BATCH, **slowly)
    return done, done + computed(side, work, **slowly) - len(rows)


def write(work: Path, rows: list[Found]) -> None:
    """The file that is trained on, in place of the one before."""
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Count, print a table, save."""
    if sys.argv[1:2] == ["--child"]:
        side, folder, asked = sys.argv[2:5]
        print(json.dumps({"lite": lite, "trl": trl}[side](Path(folder), json.loads(asked))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="tries the program with few rows")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    count = 24 if options.quick else options.rows
    found = {side: costs(side, count) for side in SIDES}
    print(f"rows of {count} computed again by".ljust(32) + "".join(side.rjust(24) for side in SIDES))
    for name in found["lite"]:
        print(name.ljust(32) + "".join(str(found[side][name]).rjust(24) for side in SIDES))
    save({"command": command(), "machine": machine(), "rows": count, "recomputed": found}, options.out)


if __name__ == "__main__":
    main()
