"""A step on meta and the same step on the CPU, of a model that was written, loaded and quantised as a user's is."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from lite.attention.branch_attention import install
from lite.data.packs import Batch
from lite.device import meta_stands_for
from lite.engine.layout import layout_of, path_of
from lite.engine.objective import Objective
from lite.engine.scalars import Scalars
from lite.memory import marks
from lite.memory.levers import Levers, pull
from lite.model import load, trained
from lite.model.head import unwrapped
from lite.plan import dry_run, lengths, skeleton
from lite.plan.cards import CARDS, CONTEXT_BYTES, FRAGMENTATION
from lite.plan.cost import Cost
from lite.plan.dry_run import Account
from lite.plan.lengths import Lengths, Row, batch_of
from lite.plan.target import Target
from lite.plan.trials import Trials
from lite.recipe import Recipe
from tests.model.tiny import tiny_model, tiny_tokenizer

ROW = Row(24, (40, 30))
ROWS = Lengths(ROW, None, 2 * ROW.tokens, 2 * ROW.tokens, ROW)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory):
    """written("qwen3"): the folder of a tiny model of that architecture."""

    @functools.cache
    def write(architecture: str, layers: int = 3) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        tiny_model(architecture, num_hidden_layers=layers).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    return write


def recipe_of(folder: Path, **settings: object) -> Recipe:
    rank = {} if "full" in settings or "galore" in settings else {"lora_r": 4}
    return Recipe(**{"model": str(folder), "device": "cpu", "dtype": "float32", "chunk_tokens": 16, **rank, **settings})


def real(recipe: Recipe, levers: Levers):
    """The model as a run loads it."""
    model = trained.attach(load.load_model(recipe, host_layers=levers.layers_on_host), recipe).train()
    install(model)
    pull(model, levers)
    return model


def bare(recipe: Recipe, levers: Levers):
    """The same model without memory."""
    dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
    model = skeleton.skeleton(recipe, skeleton.config_of(recipe), dtype)
    pull(model, levers)
    return model


def metered(
    model, recipe: Recipe, rows: Lengths = ROWS, *, later: bool = False, packs: int = 1, kind: type[Account] = Account
) -> Account:
    """One step under the meter, its operators traced: of all rows in so many packs; later: after another pack."""
    device = torch.device(unwrapped(model).get_output_embeddings().weight.device)
    layout = replace(layout_of(recipe, model), tokens_per_pack=rows.batch_tokens // packs)
    batch = placed(batch_of(rows, layout, rows.batch_tokens), device)
    scalars = Scalars.of(recipe, device)
    objective = Objective.of(recipe.signature, recipe.hyperparameters, scalars.values)
    meter = kind(Cost(CARDS["rtx-4090"], 1), words=dry_run.words_of(model), trace=True)
    with meta_stands_for("cpu"), marks.watching(meter), dry_run._meta_optimizers():
        dry_run.run(model, batch, recipe, path_of(recipe), objective, scalars, meter, later=later)
    return meter


def placed(batch: Batch, device: torch.device) -> Batch:
    """A batch whose tensors lie on the device beforehand, each with a storage of its own, as after a real transfer.

    Its words differ: of alike ones queries and keys have no gradient, and a real step then looks for no subspace.
    """
    packs = [pack.to(device) for pack in batch.packs]
    apart = [replace(pack, ids=_different(pack.ids), positions=pack.positions.clone()) for pack in packs]
    return replace(batch, packs=tuple(apart))


def _different(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(ids.numel(), device=ids.device, dtype=ids.dtype).remainder(200).view(ids.shape)


@pytest.fixture(scope="session")
def shaped(tmp_path_factory: pytest.TempPathFactory):
    """shaped(layers=6): a folder with the config of a model as wide as real ones; a plan needs no more of it."""

    @functools.cache
    def write(layers: int = 5, *, tied: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("shaped")
        Qwen2Config(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=32_000,
            tie_word_embeddings=tied,
            max_position_embeddings=2**17,
        ).save_pretrained(folder)
        return folder

    return write


def wide_recipe(folder: Path, **settings: object) -> Recipe:
    return Recipe(**{"model": str(folder), "load_in_4bit": True, "batch_size": 2, "max_length": 1024, **settings})


def where_of(budget: float, card: str = "rtx-4090") -> Target:
    """A card of which a step may take so many bytes."""
    room = round((budget + CONTEXT_BYTES) / (1 - FRAGMENTATION))
    return Target("cuda", CARDS[card], round(budget), room, 2**45, torch.bfloat16, False)


def trials_of(recipe: Recipe, budget: float, rows: Lengths | None = None) -> Trials:
    return Trials(recipe, skeleton.config_of(recipe), rows or lengths.assumed(recipe), where_of(budget))
