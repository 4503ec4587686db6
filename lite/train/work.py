"""Work: all that the steps of a run need, made ready from its recipe; nothing is written into the run's folder yet."""

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lite import signatures
from lite.attention.branch_attention import install
from lite.data import balance
from lite.data.batches import Batches as EpochBatches
from lite.data.batches import plan_batches, plan_evaluation
from lite.data.examples import TokenExample
from lite.data.packing import pack_sizes
from lite.data.packs import Layout, Reference
from lite.data.prepare import Prepared, prepare
from lite.engine import layout, score, selfcheck
from lite.engine.forward import Path as ForwardPath
from lite.engine.objective import Objective
from lite.engine.optimizer import require as require_optimizer
from lite.engine.scalars import Scalars
from lite.memory.levers import Levers, pull
from lite.model import load, trained
from lite.model.head import unwrapped
from lite.model.origin import weights_mark
from lite.model.trained import Trained
from lite.plan.plan import Plan
from lite.recipe import Recipe
from lite.reference import precompute
from lite.reference.lookup import Cached, FromColumns
from lite.reference.store import Store
from lite.reference.weights import Identity
from lite.train import disk, failures, judged, machine, trackers
from lite.train.batches import Batches
from lite.train.memory import plan_run
from lite.train.progress import Progress
from lite.train.recovery import Room
from lite.train.refresh import Refresh


@dataclass(frozen=True)
class Work:
    """All that the steps need, ready to run."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    data: Prepared
    model: Trained
    room: Room
    path: ForwardPath
    objective: Objective
    scalars: Scalars
    reference: Reference | None
    progress: Progress
    plan: Plan | None  # of its memory; None of a model that cannot be planned

    @property
    def layout(self) -> Layout:
        """How examples become packs, from here on."""
        return self.room.layout

    @property
    def batches(self) -> Batches:
        """Every step of the run, in order, each laid out as there is room when it is read."""
        epoch = functools.lru_cache(maxsize=1)(self._epoch)
        steps_per_epoch = len(epoch(0, self.layout))
        steps = planned_steps(self.recipe, self.data)
        return Batches(lambda number: epoch(number, self.layout), steps_per_epoch, steps, self._made_by)

    def _made_by(self) -> tuple[Layout, Identity | None]:
        return self.layout, self.reference.identity if isinstance(self.reference, Cached) else None

    def _epoch(self, number: int, layout: Layout) -> EpochBatches:
        size, seed = self.recipe.batch_size, self.recipe.seed
        return plan_batches(self.data.train, layout, batch_size=size, seed=seed, epoch=number, reference=self.reference)

    def refresh(self, folder: Path) -> Refresh | None:
        """What lets the policy become the reference as the steps go on, if the recipe asks for it."""
        if self.recipe.refresh_reference is None or not isinstance(self.reference, Cached):
            return None
        return Refresh(
            self.recipe.refresh_reference,
            self.reference,
            self.model,
            self.data.held_out,
            room=self.room,
            path=self.path,
            folder=folder,
            note=self.progress.note,
        )

    def evaluate(self, folder: Path, step: int) -> dict[str, float]:
        """Loss and metrics over the held-out rows; what the policy said of them is kept in the run's folder."""
        rows, size = self.data.held_out, self.recipe.batch_size

        def attempt() -> tuple[dict[str, float], judged.Kept]:
            batches = plan_evaluation(rows, self.layout, batch_size=size, reference=self.reference)
            kept = judged.Kept(self.layout.completions)
            return score.evaluate(self.model, batches, self.objective, self.path, kept.see), kept

        found, kept = self.room.within(
            f"evaluation at step {step}",
            attempt,
            lambda: (rows, max(max(pack_sizes(rows[i : i + size], self.layout)) for i in range(0, len(rows), size))),
        )
        kept.save(folder, step, rows)
        return found

    def identity(self) -> dict[str, Any]:
        """What a resume must find unchanged."""
        return {
            "recipe": self.recipe.resolved(),
            "steps": planned_steps(self.recipe, self.data),
            "data": self.data.digest,
            "loss": loss_identity(self.recipe),
            "model": _model_identity(self.recipe, self.model, self.reference),
        }


def read(recipe: Recipe, progress: Progress) -> tuple[PreTrainedTokenizerBase, Prepared]:
    """The data, as token ids; nothing heavy yet."""
    machine.require_one_process()
    trackers.require(recipe)
    require_optimizer(recipe, load.device(recipe))
    progress.stage("reading the data" + (" from stdin" if "-" in (recipe.data, recipe.eval_data) else ""))
    tokenizer = load.load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    for line in data.ledger.lines():
        progress.note(line)
    settings = {key.rpartition(".")[2]: value for key, value in recipe.hyperparameters.items()}  # of a sum as well
    weights = [settings.get(f"{kind}_weight") for kind in ("desirable", "undesirable")]
    if None not in weights and (advised := balance.advice(data.train, *weights)):
        progress.note(advised)
    return tokenizer, data


def set_up(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    data: Prepared,
    progress: Progress,
    *,
    open_until: ExitStack,
    folder: Path | None = None,
    start_adapter: Path | None = None,
    plan: Plan | None = None,
    go_on: bool = False,
) -> Work:
    """Everything up to step 1; `start_adapter` stands in for the one that the recipe goes on from.

    folder: where the run will be or is, whose disk must have room for what whole weights leave; None: nothing is left.

    The memory settings that the recipe leaves open are settled first, by the plan, which stops a run that does not fit
    unless it has to `go_on`; `plan`: they are, by that one.

    The reference's log-probs are in the cache when this returns, which stays open until `open_until` closes. No run has
    been written yet, so a user's mistake leaves no folder behind.
    """
    if plan is None:
        recipe, plan = plan_run(recipe, data, planned_steps(recipe, data), progress, go_on=go_on)
    levers = Levers.of(recipe)
    here = recipe if start_adapter is None else recipe.model_copy(update={"adapter": str(start_adapter), "run": None})
    compares = recipe.signature.reference and not recipe.ref_columns
    store = open_until.enter_context(Store.open(Path(recipe.cache) if recipe.cache else None)) if compares else None
    examples = [*needed(recipe, data), *data.held_out] if store else []
    filled = None
    if store and recipe.ref is not None:
        with _kept():
            filled = precompute.by_model(recipe, store, examples, tokenizer, progress.rows, progress.stage)
    progress.stage(f"loading {recipe.model}")
    machine.make_ready(load.device(recipe))
    model = trained.attach(load.load_model(recipe, host_layers=levers.layers_on_host), here)
    if recipe.full and folder is not None:
        steps = planned_steps(recipe, data)
        disk.require_room(recipe, model, steps, folder, note=progress.note, go_on=go_on)
    pull(model, levers)
    path, chosen = layout.path_of(recipe), layout.layout_of(recipe, model)
    if recipe.self_check:
        progress.stage("comparing with the plain model")
        chosen = selfcheck.choose_layout(model, data.train, chosen, path)
    else:
        install(model, padded=chosen.padded)
    if store and filled is None:
        progress.stage("reading the reference's log-probs")
        with _kept():
            filled = precompute.by_policy(here, store, examples, model, chosen, path, progress.rows)
    reference: Reference | None = FromColumns() if recipe.ref_columns else None
    if store and filled:
        progress.note(f"reference: {filled.computed} rows computed, {filled.reused} found in {store.path}")
        reference = Cached(store, filled.identity, precompute.wanted_words(recipe))
    scalars = Scalars.of(recipe, model.device)
    objective = Objective.of(recipe.signature, recipe.hyperparameters, scalars.values)
    room = Room(chosen, progress.note, failures.lower_of_one(recipe))
    return Work(recipe, tokenizer, data, model, room, path, objective, scalars, reference, progress, plan)


@contextmanager
def _kept() -> Iterator[None]:
    """While the reference is read: whoever stops it hears that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("What was read of the reference is in the cache; the same command goes on.") from None


def planned_steps(recipe: Recipe, data: Prepared) -> int:
    """Optimizer steps of the run."""
    per_epoch = math.ceil(len(data.train) / recipe.batch_size)
    return recipe.max_steps or math.ceil(recipe.num_train_epochs * per_epoch)


def needed(recipe: Recipe, data: Prepared) -> Sequence[TokenExample]:
    """The training examples that the run's steps will see, in the data's order: a short run reads no more reference."""
    per_epoch = math.ceil(len(data.train) / recipe.batch_size)
    steps = planned_steps(recipe, data)
    if steps >= per_epoch:
        return data.train
    order = plan_batches(data.train, Layout(()), batch_size=recipe.batch_size, seed=recipe.seed).members
    return [data.train[i] for i in sorted(i for members in order[:steps] for i in members)]


def loss_identity(recipe: Recipe) -> str | None:
    """A digest of the user's own losses' files; None for lite's, of which the environment tells the version."""
    signature = recipe.signature
    paths = {one.path for one in (signature, *(term.signature for term in signature.terms))}
    own = sorted(path for path in paths if path.parent != signatures.LOSSES)
    return hashlib.blake2b(b"".join(path.read_bytes() for path in own), digest_size=16).hexdigest() if own else None


def _model_identity(recipe: Recipe, model: Trained, reference: Reference | None) -> dict[str, Any]:
    """The model's name and, of a folder, its files' sizes and a mark of the weights; of the hub, the commit.

    And its reference, if any.
    """
    config = unwrapped(model).config
    folder = Path(config.name_or_path)
    compared = {"reference": reference.identity.key.hex()} if isinstance(reference, Cached) else {}
    if not folder.is_dir():
        return {"name": recipe.model, "commit": config._commit_hash, **compared}
    patterns = ("config.json", "*.safetensors", "*.bin")
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    sizes = {path.name: path.stat().st_size for path in files}
    return {"name": recipe.model, "files": sizes, "weights": weights_mark(folder), **compared}
