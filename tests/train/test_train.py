"""The story of a run, from Python: what it leaves, how it goes on, and when it refuses to."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import lite
from lite.errors import DataError, ModelError, RecipeError, RunError
from lite.model import trained_with
from lite.recipe import Recipe
from lite.train import checkpoints, resume, train
from tests.tiny import write_pairs

COMPARED = ("adapter/adapter_model.safetensors", "metrics.jsonl", "samples.json")


class Listener:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done: list[int] = []
        self.began: tuple[int, int] | None = None
        self.closed = False

    def stage(self, message: str) -> None:
        self.notes.append(message)

    note = stage

    def rows(self, done: int, total: int) -> None:
        pass

    def steps(self, total: int, done: int) -> None:
        self.began = total, done

    def step(self, step: int, metrics: dict[str, float]) -> None:
        assert {"loss", "rewards/margins", "seconds", "tokens_per_second", "memory_bytes"} <= metrics.keys()
        self.done.append(step)

    def evaluation(self, name: str, metrics: dict[str, float]) -> None:
        self.notes.append(f"evaluation {name}")

    def samples(self, when: str, samples: list) -> None:
        self.notes.append(f"{len(samples)} samples {when}")

    def stopping(self) -> None:
        self.notes.append("stopping")

    def close(self) -> None:
        self.closed = True


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in COMPARED}


def test_a_run_leaves_what_the_design_says(recipe: Callable) -> None:
    listener = Listener()
    run = lite.train(recipe(), listener)
    again = lite.train  # by now the name is also that of a module
    assert callable(again)
    assert isinstance(run, lite.Run)
    left = {path.name for path in run.folder.iterdir()}
    assert left == {
        "recipe.yaml", "identity.json", "environment.json", "ledger.json", "metrics.jsonl", "speed.jsonl",
        "checkpoints", "adapter", "samples.json", "result.json", ".lock", "logps", "plan.json",
    }  # fmt: skip
    assert run.result.keys() == {"run", "steps", "seconds", "peak_bytes", "packing", "eval_before", "eval_after"}
    assert json.loads((run.folder / "result.json").read_text(encoding="utf-8")) == run.result
    assert run.result["steps"] == 10
    assert run.result["eval_before"]["eval_rewards/margins"] < run.result["eval_after"]["eval_rewards/margins"]
    assert run.result["peak_bytes"] > 50e6
    assert [line["step"] for line in run.metrics if "loss" in line] == list(range(1, 11))
    # Before, at each checkpoint, after.
    assert [line["step"] for line in run.metrics if "eval_loss" in line] == [0, 3, 6, 9, 10]
    assert json.loads((run.folder / "ledger.json").read_text(encoding="utf-8"))["kept"] == 23
    assert (listener.began, listener.done, listener.closed) == ((10, 0), list(range(1, 11)), True)
    assert [n for n in listener.notes if "evaluation" in n or "samples" in n] == [
        "evaluation before", "1 samples before", "evaluation at step 3", "evaluation at step 6", "evaluation at step 9",
        "evaluation after", "1 samples after",
    ]  # fmt: skip


def test_the_saved_recipe_reruns_the_run(recipe: Callable, tmp_path: Path) -> None:
    run = train(recipe())
    assert lite.recipe.load(run.folder / "recipe.yaml").output_dir is None  # or it would ask for the folder it lies in
    again = train(lite.recipe.load(run.folder / "recipe.yaml", output_dir=str(tmp_path / "again")))
    assert contents(run.folder) == contents(again.folder)


def test_the_adapter_stands_alone(recipe: Callable, tiny: Path) -> None:
    """peft on the plain base gives the run's own logps with it; tokenizer, template and stop tokens are there too."""
    run = train(recipe())
    assert trained_with.read(run.adapter) == trained_with.record_of(run.adapter)
    tokenizer = AutoTokenizer.from_pretrained(str(run.adapter))
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(str(tiny / "model")).chat_template
    assert GenerationConfig.from_pretrained(str(run.adapter)).eos_token_id == [tokenizer.eos_token_id]
    base = AutoModelForCausalLM.from_pretrained(str(tiny / "model"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(run.adapter))
    means = []
    for row in map(json.loads, (tiny / "held_out.jsonl").read_text(encoding="utf-8").splitlines()):
        turn = [{"role": "user", "content": row["prompt"]}]
        start = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        prompt, whole = (tokenizer(text).input_ids for text in (start, f"{start}{row['chosen']}<|im_end|>"))
        with torch.no_grad():
            logps = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        scored = logps[range(len(prompt) - 1, len(whole) - 1), whole[len(prompt) :]]
        means.append(float(scored.mean()))
    assert run.result["eval_after"]["eval_logps/chosen"] == pytest.approx(sum(means) / 3, rel=1e-5)


def test_a_run_on_plain_text_leaves_no_template(recipe: Callable) -> None:
    """Whoever talks to it later must not wrap what is said in the base's template."""
    run = train(recipe(chat_template="none", max_steps=1))
    assert AutoTokenizer.from_pretrained(str(run.adapter)).chat_template is None
    assert trained_with.read(run.adapter).chat_template is None


def test_padded_batches_learn_the_same(recipe: Callable, tmp_path: Path) -> None:
    packed = train(recipe())
    padded = train(recipe(attn_implementation="padded", output_dir=str(tmp_path / "padded")))
    for one, other in zip(packed.metrics, padded.metrics, strict=True):
        for name in one.keys() & {"loss", "eval_loss"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3)


def test_a_broken_checkpoint_costs_only_its_steps(recipe: Callable) -> None:
    run = train(recipe())
    before = contents(run.folder)
    (run.folder / "result.json").unlink()
    shutil.rmtree(run.adapter)
    os.truncate(run.folder / "checkpoints" / "checkpoint-10" / "optimizer.pt", 100)
    listener = Listener()
    resume(run.folder, progress=listener)
    assert listener.done == [10]
    assert any("checkpoint-10: skipped, for it is broken" in note for note in listener.notes)
    assert contents(run.folder) == before
    assert checkpoints.problems(run.folder / "checkpoints" / "checkpoint-10") == []


def test_a_finished_run_is_returned_as_it_is(recipe: Callable) -> None:
    run = train(recipe())
    written = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    listener = Listener()
    again = resume(run.folder, progress=listener)
    assert again.result == run.result
    assert "finished already, after 10 steps" in listener.notes[0]
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == written


def test_more_steps_by_name(recipe: Callable) -> None:
    """The cosine of 10 steps had come down to 0.3 % of the peak; that of 14 has 30 % left at step 10."""
    run = train(recipe(warmup_ratio=0.0))
    with pytest.raises(RunError, match=r"--max-steps 9: .* has 10 planned, which may be raised, not lowered"):
        resume(run.folder, max_steps=9)
    longer = resume(run.folder, max_steps=14)
    assert longer.result["steps"] == 14
    assert longer.result["eval_before"] == run.result["eval_before"]
    assert [line["step"] for line in longer.metrics if "loss" in line] == list(range(1, 15))
    assert [line["step"] for line in longer.metrics if "eval_loss" in line] == [0, 3, 6, 9, 12, 14]
    rates = {line["step"]: line["learning_rate"] for line in longer.metrics if "learning_rate" in line}
    assert rates[11] == pytest.approx(1e-2 * 0.5 * (1 + torch.tensor(torch.pi * 10 / 14).cos().item()), rel=1e-5)
    assert resume(run.folder).result == longer.result


def test_it_goes_on_from_another_run_whatever_becomes_of_that(recipe: Callable, tmp_path: Path) -> None:
    first = train(recipe())
    start = (first.adapter / "adapter_model.safetensors").read_bytes()
    second = train(recipe(run=str(first.folder), output_dir=str(tmp_path / "second")))
    before = contents(second.folder)
    assert (second.folder / "start_adapter" / "adapter_model.safetensors").read_bytes() == start
    assert second.result["eval_before"]["eval_loss"] == pytest.approx(first.result["eval_after"]["eval_loss"])
    shutil.rmtree(first.folder)
    (second.folder / "result.json").unlink()
    shutil.rmtree(second.folder / "checkpoints")
    (second.folder / "checkpoints").mkdir()
    resume(second.folder)
    assert contents(second.folder) == before


def test_resume_refuses_another_recipe_and_other_data(recipe: Callable, tiny: Path, tmp_path: Path) -> None:
    data = shutil.copy(tiny / "pairs.jsonl", tmp_path / "pairs.jsonl")
    run = train(recipe(data=str(data), max_steps=1))
    (run.folder / "result.json").unlink()
    write_pairs(data, 19)
    file = run.folder / "recipe.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("beta: 0.1", "beta: 0.2"), encoding="utf-8")
    with pytest.raises(RunError) as caught:
        resume(run.folder)
    assert "beta: was 0.1, is 0.2 in recipe.yaml" in str(caught.value)
    assert f"data: the rows of {data}" in str(caught.value)


def test_too_high_a_rate_stops_the_run_and_names_the_rows(recipe: Callable, tiny: Path) -> None:
    with pytest.raises(RunError, match=r"Step \d+: the (loss|gradient's norm) is (nan|inf)") as caught:
        train(recipe(learning_rate=1e30, save_steps=1, max_grad_norm=0.0))
    assert f"{tiny / 'pairs.jsonl'}:" in str(caught.value)


def test_weights_that_the_last_update_broke_are_not_saved(recipe: Callable) -> None:
    """No step comes after the last one to stumble over them."""
    asked = recipe(learning_rate=1e39, warmup_ratio=0.0, max_steps=1)
    with pytest.raises(RunError, match=r"Step 1: the largest weight after it is (nan|inf)"):
        train(asked)
    assert list((Path(asked.output_dir) / "checkpoints").iterdir()) == []
    assert not (Path(asked.output_dir) / "adapter").exists()


def test_a_loss_of_ones_own_that_changed_is_refused(recipe: Callable, tmp_path: Path) -> None:
    """Its defaults are as they were, so the recipe alone does not tell."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from lite.loss.registry import Scored, loss\n\n\n@loss\ndef mine(chosen, rejected):\n"
        '    """Mine."""\n    return Scored(rejected.mean - chosen.mean, {})\n',
        encoding="utf-8",
    )
    run = train(recipe(method=f"{file}:mine", max_steps=1))
    (run.folder / "result.json").unlink()
    file.write_text(
        file.read_text(encoding="utf-8").replace("rejected.mean -", "2 * rejected.mean -"), encoding="utf-8"
    )
    with pytest.raises(RunError, match=rf"method: the file of {file}:mine is not as it was"):
        resume(run.folder)


def test_the_last_steps_are_in_a_line(recipe: Callable) -> None:
    """Ten steps, a line every four: the tenth ends the last line."""
    run = train(recipe(logging_steps=4))
    assert [line["step"] for line in run.metrics if "loss" in line] == [4, 8, 10]


def test_a_run_that_had_all_its_steps_takes_none(recipe: Callable) -> None:
    """Also if an earlier lite began it, which had not all of today's settings."""
    run = train(recipe())
    (run.folder / "result.json").unlink()
    newer = [key for key, field in Recipe.model_fields.items() if field.json_schema_extra["panel"] == "Full training"]
    identity = json.loads((run.folder / "identity.json").read_text())
    settings = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    for key in newer:
        del identity["recipe"][key], settings[key]
    (run.folder / "identity.json").write_text(json.dumps(identity))
    (run.folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    listener = Listener()
    assert resume(run.folder, progress=listener).result["steps"] == 10
    assert (listener.began, listener.done) == (None, [])


def test_another_run_in_the_same_folder_meanwhile(recipe: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found the folder free; the other was done before this one had loaded its model."""
    story = sys.modules["lite.train.train"]  # the name in its package is that of the function
    wait = story.set_up

    def other_first(*given: object, **named: object) -> object:
        monkeypatch.setattr(story, "set_up", wait)
        train(recipe(max_steps=1))
        return wait(*given, **named)

    monkeypatch.setattr(story, "set_up", other_first)
    with pytest.raises(RunError, match="holds a run already"):
        train(recipe(max_steps=2))


def test_several_processes_are_refused(recipe: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="WORLD_SIZE = 2: lite trains in one process"):
        train(recipe())


def test_a_mistake_leaves_no_folder(recipe: Callable, tiny: Path, tmp_path: Path) -> None:
    for error, changes in (
        (DataError, {"data": str(tmp_path / "not-there.jsonl")}),
        (ModelError, {"lora_target_modules": "q_prok"}),
        (RecipeError, {"report_to": "no-such-tracker"}),
        (RecipeError, {"optimizer": "paged-adamw-8bit", "device": "cpu"}),
    ):
        listener = Listener()
        with pytest.raises(error):
            train(recipe(**changes), listener)
        assert listener.closed
        assert not (tmp_path / "run").exists()


def test_a_taken_folder_is_refused_before_any_work(recipe: Callable) -> None:
    train(recipe(max_steps=1))
    listener = Listener()
    with pytest.raises(RunError, match="holds a run already"):
        train(recipe(), listener)
    assert listener.notes == []


def test_skipped_rows_are_listed_in_the_run(recipe: Callable, tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = (tiny / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join([*rows, '{"prompt": "a", "chosen": "b"', '{"prompt": "a"}']), encoding="utf-8")
    run = train(recipe(data=str(data), skip_bad_rows=True, max_steps=1))
    listed = (run.folder / "rows_skipped.txt").read_text(encoding="utf-8")
    assert f"{data}:21: " in listed
    assert f"{data}:22: " in listed


def test_without_held_out_rows_it_trains_all_the_same(recipe: Callable, tmp_path: Path) -> None:
    """Of a single row none is held out."""
    write_pairs(tmp_path / "one.jsonl", 1)
    listener = Listener()
    run = train(recipe(data=str(tmp_path / "one.jsonl"), eval_data=None, max_steps=2, eval_steps=1), listener)
    assert (run.result["eval_before"], run.result["eval_after"]) == ({}, {})
    assert [line["step"] for line in run.metrics] == [1, 2]
    assert any("no held-out rows" in note for note in listener.notes)
