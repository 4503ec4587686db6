"""A stale hit is impossible: whatever changes the numbers is a miss, and nothing else is."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lite
from lite.errors import ModelError, RecipeError
from lite.recipe import Recipe
from lite.reference.precompute import identity_of
from lite.reference.store import Store
from tests.tiny import tiny_settings, write_pairs, write_world

DISTINCT = 20  # rows of the world; its 3 held-out ones are among them


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def mine(world: Path, tmp_path: Path) -> Path:
    """A copy of the world to change, with a cache that is filled."""
    shutil.copytree(world, tmp_path / "mine")
    assert precomputed(tmp_path / "mine")["computed"] == DISTINCT
    return tmp_path / "mine"


def recipe_of(folder: Path, **changes: object) -> Recipe:
    return Recipe(**tiny_settings(folder, **{"method": "dpo", "cache": str(folder / "cache"), **changes}))


def precomputed(folder: Path, **changes: object) -> dict:
    return lite.precompute(recipe_of(folder, **changes))


def test_a_second_call_computes_nothing(mine: Path) -> None:
    again = precomputed(mine)
    assert (again["rows"], again["computed"], again["reused"]) == (23, 0, 23)


@pytest.mark.parametrize(
    "changes",
    [{"lora_r": 3}, {"seed": 7}, {"beta": 0.5}, {"method": "ipo"}, {"method": "rpo"}, {"loss": "dpo:1,sft:0.1"},
     {"learning_rate": 1e-3}, {"batch_size": 2}, {"tokens_per_pack": 64}, {"chunk_tokens": 3}, {"method": "kto"}],
    ids=str,
)  # fmt: skip
def test_what_leaves_the_numbers_alone_sees_only_hits(mine: Path, changes: dict) -> None:
    """KTO's rows are the same completions; its completions of other rows are new, so it alone computes some."""
    found = precomputed(mine, **changes)
    assert found["computed"] == 0 or changes == {"method": "kto"}


def test_the_order_of_the_rows_and_a_new_name_see_only_hits(mine: Path) -> None:
    lines = (mine / "pairs.jsonl").read_text().splitlines()
    (mine / "shuffled.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    assert precomputed(mine, data=str(mine / "shuffled.jsonl"))["computed"] == 0


def test_new_rows_cost_themselves(mine: Path) -> None:
    write_pairs(mine / "more.jsonl", 25)
    found = precomputed(mine, data=str(mine / "more.jsonl"))
    assert (found["rows"], found["computed"]) == (28, 5)


def test_one_element_of_one_weight_is_a_miss(mine: Path) -> None:
    path = mine / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    assert precomputed(mine)["computed"] == DISTINCT


def test_with_the_time_put_back_verify_finds_it(mine: Path) -> None:
    """Same size, same inode, same time: only reading tells. `verify` reads, and the next run sees a miss."""
    path = mine / "model" / "model.safetensors"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with Store.open(mine / "cache") as store:
        found = store.verify()
    assert any("model.safetensors" in str(one) for one in found.changed)
    assert precomputed(mine)["computed"] == DISTINCT


def test_the_config_is_part_of_the_model(mine: Path) -> None:
    path = mine / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert precomputed(mine)["computed"] == DISTINCT


def test_code_of_the_models_own_is_a_miss(mine: Path) -> None:
    """transformers has a Qwen3; the folder brings another, which is run only if the user says so."""
    config = json.loads((mine / "model" / "config.json").read_text())
    with Store.open(mine / "cache") as store:
        before = identity_of(recipe_of(mine), store)
        assert identity_of(recipe_of(mine, trust_remote_code=True), store) == before
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
        (mine / "model" / "config.json").write_text(json.dumps(config))
        known, own = (identity_of(recipe_of(mine, trust_remote_code=trust), store) for trust in (False, True))
    assert len({before.key, known.key, own.key}) == 3


def test_the_quantisation_and_the_dtype_are_a_miss(mine: Path) -> None:
    assert precomputed(mine, load_in_4bit=True)["computed"] == DISTINCT
    assert precomputed(mine, load_in_8bit=True)["computed"] == DISTINCT
    assert precomputed(mine, dtype="bfloat16")["computed"] == DISTINCT
    assert precomputed(mine)["computed"] == 0


def test_the_template_is_a_miss(mine: Path) -> None:
    template = mine / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("+ m['role'] +", "+ m['role'] + ' ' +"))
    assert precomputed(mine)["computed"] == DISTINCT


def test_one_token_of_one_row_is_a_miss(mine: Path) -> None:
    lines = (mine / "pairs.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace("yes", "yet", 1)
    (mine / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    assert precomputed(mine)["computed"] == 1


def test_the_adapter_it_goes_on_from_is_a_miss(mine: Path, tmp_path: Path) -> None:
    """A run's adapter is another model than the base; one element of the adapter is another adapter."""
    trained = lite.train(recipe_of(mine, output_dir=str(tmp_path / "run"), max_steps=1, samples=0))
    assert precomputed(mine)["computed"] == 0
    assert precomputed(mine, run=str(trained.folder))["computed"] == DISTINCT
    assert precomputed(mine, run=str(trained.folder))["computed"] == 0
    path = trained.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    assert precomputed(mine, run=str(trained.folder))["computed"] == DISTINCT


def test_the_adapter_it_goes_on_from_is_the_reference(mine: Path, tmp_path: Path) -> None:
    """A run that goes on begins at ln 2, whether precompute read the model with its adapter or the run itself did.

    From the base, with that adapter on --ref, the rewards are those of the run that trained it, with the sign turned.
    """
    first = lite.train(recipe_of(mine, output_dir=str(tmp_path / "first"), max_steps=5, samples=0))
    learnt = first.result["eval_after"]["eval_rewards/margins"]
    assert abs(learnt) > 1e-2
    precomputed(mine, run=str(first.folder))
    short = {"max_steps": 1, "samples": 0}
    for cache in ("cache", "another"):
        asked = recipe_of(
            mine, run=str(first.folder), cache=str(mine / cache), output_dir=str(tmp_path / cache), **short
        )
        before = lite.train(asked).result["eval_before"]
        assert before["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
        assert abs(before["eval_rewards/chosen"]) <= 1e-4
    beside = {"ref": str(mine / "model"), "ref_adapter": str(first.adapter)}
    before = lite.train(recipe_of(mine, output_dir=str(tmp_path / "beside"), **beside, **short)).result["eval_before"]
    assert before["eval_rewards/margins"] == pytest.approx(-learnt, abs=1e-4)


def test_a_setting_of_the_adapter_is_a_miss(mine: Path, tmp_path: Path) -> None:
    """The same tensors, of which some are scaled otherwise; where the adapter says it comes from is no matter."""
    trained = lite.train(recipe_of(mine, output_dir=str(tmp_path / "run"), max_steps=1, samples=0))
    path = trained.adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    assert precomputed(mine, run=str(trained.folder))["computed"] == DISTINCT
    path.write_text(json.dumps({**config, "base_model_name_or_path": "elsewhere", "peft_version": "0.99"}))
    assert precomputed(mine, run=str(trained.folder))["computed"] == 0
    path.write_text(json.dumps({**config, "alpha_pattern": {"q_proj": 64}}))
    assert precomputed(mine, run=str(trained.folder))["computed"] == DISTINCT


def test_another_model_as_the_reference(mine: Path, tmp_path: Path) -> None:
    """--ref: read, and used; the same folder named by --ref is the policy's own start, which the cache has."""
    assert precomputed(mine, ref=str(mine / "model"))["computed"] == 0
    shutil.copytree(mine / "model", mine / "other")
    tensors = load_file(mine / "other" / "model.safetensors")
    tensors["model.norm.weight"] *= 0.5
    save_file(tensors, mine / "other" / "model.safetensors", metadata={"format": "pt"})
    run = lite.train(recipe_of(mine, ref=str(mine / "other"), output_dir=str(tmp_path / "run"), max_steps=1))
    assert run.result["eval_before"]["eval_loss"] != pytest.approx(0.6931, abs=1e-3)
    # The step's four rows and the held-out three, which stand among the rows once more.
    assert precomputed(mine, ref=str(mine / "other"))["computed"] <= DISTINCT - 4


def test_another_vocabulary_is_refused(mine: Path) -> None:
    shutil.copytree(mine / "model", mine / "other")
    path = mine / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"2 of 259 words have other ids.*'A'"):
        precomputed(mine, ref=str(mine / "other"))


def test_a_loss_without_a_reference_has_nothing_to_precompute(mine: Path) -> None:
    with pytest.raises(RecipeError, match="orpo: has no reference"):
        precomputed(mine, method="orpo")


def test_training_reads_what_precompute_wrote_and_starts_at_ln_2(mine: Path, tmp_path: Path) -> None:
    run = lite.train(recipe_of(mine, output_dir=str(tmp_path / "run"), max_steps=2, samples=0))
    assert run.result["eval_before"]["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert abs(run.result["eval_before"]["eval_rewards/chosen"]) <= 1e-4
    assert torch.isfinite(torch.tensor(run.result["eval_after"]["eval_loss"]))


def test_more_words_than_there_are(mine: Path) -> None:
    with pytest.raises(RecipeError, match=r"top_k = 300: the reference knows 259 words\."):
        precomputed(mine, method="distill", ref=str(mine / "model"), top_k=300)


def test_a_reference_of_nans_is_told_by_its_rows(mine: Path) -> None:
    path = mine / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no numbers(.|\n)*pairs.jsonl:4: token 1 of"):
        precomputed(mine, self_check=False)
