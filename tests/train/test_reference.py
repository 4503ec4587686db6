"""Runs that compare with a reference: the cache is filled before step 1, and what the loss asks for arrives."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lite
from lite.errors import RunError
from lite.train import judged
from tests.train.test_train import Listener


@pytest.fixture
def compared(recipe: Callable, tmp_path: Path) -> Callable[..., lite.Recipe]:
    """recipe(…) of DPO with a cache of its own."""
    return lambda **changes: recipe(**{"method": "dpo", "cache": str(tmp_path / "cache"), "samples": 0, **changes})


def other_model(tiny: Path, folder: Path) -> Path:
    """The tiny model with other weights where an adapter can follow: in its blocks' linear layers."""
    shutil.copytree(tiny / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name in [name for name in tensors if "proj" in name]:
        tensors[name] += 0.4 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_teacher_is_learnt_from(compared: Callable, tiny: Path, tmp_path: Path) -> None:
    """distill: the KL from another model comes down, though only 16 of its words are kept and it is never beside."""
    teacher = other_model(tiny, tmp_path / "teacher")
    run = lite.train(compared(method="distill", ref=str(teacher), top_k=16, lora_r=16, num_train_epochs=8))
    before, after = run.result["eval_before"]["eval_loss"], run.result["eval_after"]["eval_loss"]
    assert before > 1e-3
    assert after < 0.5 * before


def test_every_kind_of_loss_trains(compared: Callable, tmp_path: Path) -> None:
    """Unpaired, with another row's completion; one that looks at the whole step; one that asks how sure it is."""
    for method in ("kto", "bco_pair", "wpo"):
        run = lite.train(compared(method=method, output_dir=str(tmp_path / method), max_steps=5))
        assert run.result["eval_after"]["eval_loss"] < run.result["eval_before"]["eval_loss"], method


def test_a_sum_trains_and_tells_its_parts(compared: Callable, tmp_path: Path) -> None:
    run = lite.train(compared(loss="dpo:1.0,sft:0.5", **{"dpo.beta": 0.2}))
    last = run.result["eval_after"]
    assert last["eval_loss"] == pytest.approx(last["eval_loss/dpo"] + 0.5 * last["eval_loss/sft"], rel=1e-5)
    assert lite.recipe.load(run.folder / "recipe.yaml").hyperparameters["dpo.beta"] == 0.2


def test_pairs_that_do_not_fit_are_split_and_told_once(compared: Callable, tmp_path: Path) -> None:
    """tokens_per_pack of 32 is under most pairs: same metrics as whole, up to rounding, and one line about it."""
    listener = Listener()
    whole = lite.train(compared(max_steps=4, output_dir=str(tmp_path / "whole")))
    split = lite.train(compared(max_steps=4, tokens_per_pack=32, split_pairs=True), listener)
    assert sum("one completion at a time" in note for note in listener.notes) == 1
    for one, other in zip(whole.metrics, split.metrics, strict=True):
        for name in one.keys() & {"loss", "eval_loss", "rewards/margins"}:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4)


def test_a_short_run_reads_no_more_of_the_reference(compared: Callable, tmp_path: Path) -> None:
    """Two steps of four pairs see eight of twenty rows; the held-out three are among the rows."""
    listener = Listener()
    lite.train(compared(max_steps=2), listener)
    [told] = [note for note in listener.notes if note.startswith("reference:")]
    assert int(told.split()[1]) <= 8 + 3


def test_the_refreshed_reference_is_the_policy(compared: Callable) -> None:
    """TR-DPO at every step: each step's rewards are measured from the step before, so they begin at 0 each time."""
    run = lite.train(compared(refresh_reference=1, max_steps=4, eval_steps=100))
    rewards = [line["rewards/chosen"] for line in run.metrics if "rewards/chosen" in line]
    assert len(rewards) == 4
    assert all(abs(reward) < 1e-5 for reward in rewards)
    plain = lite.train(compared(max_steps=4, output_dir=str(run.folder) + "-plain"))
    assert abs(plain.metrics[-2]["rewards/chosen"]) > 1e-4


def test_a_refreshed_reference_has_words_as_well(compared: Callable) -> None:
    """In a sum with distill the policy's likeliest words are kept anew: after each refresh the KL begins at 0."""
    run = lite.train(compared(loss="dpo:1,distill:0.1", top_k=8, refresh_reference=2, max_steps=4))
    divergences = [line["loss/distill"] for line in run.metrics if "loss/distill" in line]
    assert [abs(divergences[i]) < 1e-6 for i in range(4)] == [True, False, True, False]


def test_resume_refuses_another_loss_in_a_sum(compared: Callable, tmp_path: Path) -> None:
    """The file of the user's own loss is looked at where it is not the verb, too."""
    path = tmp_path / "own.py"
    lines = (
        "from lite.loss.registry import Scored, loss\n@loss\ndef own(chosen):\n    return Scored(-chosen.{}, {{}})\n"
    )
    path.write_text(lines.format("mean"))
    run = lite.train(compared(loss=f"dpo:1,{path}:own:0.1", max_steps=2))
    (run.folder / "result.json").unlink()
    path.write_text(lines.format("total"))
    with pytest.raises(RunError, match=r"method: the file of dpo:1,.*own:0.1 is not as it was"):
        lite.resume(run.folder)


def test_what_the_policy_said_is_kept(compared: Callable) -> None:
    """At the start, at each checkpoint, at the end: from it and the reference the logged loss follows."""
    run = lite.train(compared())
    assert judged.steps_of(run.folder) == [0, 3, 6, 9, 10]


def test_resume_refuses_another_reference(compared: Callable, tiny: Path, tmp_path: Path) -> None:
    teacher = other_model(tiny, tmp_path / "teacher")
    run = lite.train(compared(ref=str(teacher), max_steps=2))
    (run.folder / "result.json").unlink()
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.norm.weight"] *= 1.001
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="model: reference: was"):
        lite.resume(run.folder)
