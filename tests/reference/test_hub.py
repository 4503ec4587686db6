"""A reference from the hub: its copy on this machine may be partial, or older than what is loaded."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from safetensors.torch import load_file, save_file

import lite
from lite.model.origin import folder_of
from lite.recipe import Recipe
from tests.tiny import tiny_settings, write_pairs, write_world

OLD, NEW = "a" * 40, "b" * 40


class Hub:
    """The hub's cache on this machine, with two commits of `org/tiny` that come into it file by file."""

    def __init__(self, world: Path, cache: Path) -> None:
        self.world, self.repository = world, cache / "models--org--tiny"
        (self.repository / "refs").mkdir(parents=True)

    def download(self, commit: str, *, weights: bool = True) -> None:
        folder = self.repository / "snapshots" / commit
        shutil.copytree(self.world / "model", folder, dirs_exist_ok=True)
        if not weights:
            (folder / "model.safetensors").unlink()
        elif commit == NEW:
            tensors = load_file(folder / "model.safetensors")
            tensors["model.norm.weight"] *= 0.5
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (self.repository / "refs" / "main").write_text(commit)

    def recipe(self, **changes: object) -> Recipe:
        cache = str(self.world / "cache")
        return Recipe(**tiny_settings(self.world, **{"method": "dpo", "model": "org/tiny", "cache": cache, **changes}))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return Hub(write_world(tmp_path / "world"), tmp_path / "hub")


def when_loaded(monkeypatch: pytest.MonkeyPatch, download: object) -> None:
    """Let transformers download something whenever it reads a model's config, as it does with a network."""
    read = transformers.AutoConfig.from_pretrained

    def downloading(*arguments: object, **settings: object) -> object:
        download()
        return read(*arguments, **settings)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", downloading)


def test_weights_that_are_still_to_come_are_waited_for(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer brings config.json into the cache before there are weights to digest."""
    hub.download(OLD, weights=False)
    assert folder_of(hub.recipe()) is None
    when_loaded(monkeypatch, lambda: hub.download(OLD))
    assert lite.precompute(hub.recipe())["computed"] == 20
    assert folder_of(hub.recipe()) is not None


def test_half_of_the_shards_are_no_model(hub: Hub) -> None:
    hub.download(OLD)
    folder = hub.repository / "snapshots" / OLD
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {"one": shards[0], "other": shards[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert folder_of(hub.recipe()) is None
    (folder / shards[1]).write_bytes(b"")
    assert folder_of(hub.recipe()) == folder


def test_a_newer_commit_does_not_answer_for_the_older(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy here is old and lacks a row; loading it brings the new one, whose numbers are its own."""
    hub.download(OLD)
    old = lite.precompute(hub.recipe())["identity"]
    write_pairs(hub.world / "pairs.jsonl", 21)
    with monkeypatch.context() as patch:
        when_loaded(patch, lambda: hub.download(NEW))
        moved = lite.precompute(hub.recipe())
    assert moved["identity"] != old
    assert moved["computed"] == 21
    (hub.repository / "refs" / "main").write_text(OLD)
    assert lite.precompute(hub.recipe())["computed"] == 1


def test_a_copy_that_moves_on_meanwhile_does_not_name_the_policy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process fetches a newer commit between the policy's loading and its digest."""
    hub.download(OLD)
    load = transformers.AutoModelForCausalLM.from_pretrained

    def loading(*arguments: object, **settings: object) -> object:
        loaded = load(*arguments, **settings)
        hub.download(NEW)
        return loaded

    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loading)
        lite.train(hub.recipe(output_dir=str(hub.world / "run"), max_steps=1, samples=0, num_train_epochs=1))
    assert lite.precompute(hub.recipe())["computed"] == 20
    (hub.repository / "refs" / "main").write_text(OLD)
    assert lite.precompute(hub.recipe())["computed"] < 20
