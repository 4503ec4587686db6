"""Precomputing: whose log-probs a recipe compares with, and the cache filled with them before step 1.

The reference is the model as it stands before training: the base with no adapter, or with the one that the run goes on
from. Or it is another model, which is loaded, read and freed before the policy is loaded.
"""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lite.attention.branch_attention import install
from lite.data.examples import TokenExample
from lite.data.packs import Layout
from lite.engine import layout as layouts
from lite.engine import selfcheck
from lite.engine.forward import Model
from lite.engine.forward import Path as ForwardPath
from lite.errors import CacheError, ModelError, RecipeError
from lite.model import adapters, load
from lite.model.head import head_of, unwrapped
from lite.model.origin import origin
from lite.recipe import Recipe
from lite.reference.fill import fill, missing
from lite.reference.store import Store
from lite.reference.weights import Identity, files_digest, tensors_digest

log = logging.getLogger(__name__)

Told = Callable[[int, int], None]  # examples done, of how many


@dataclass(frozen=True)
class Filled:
    """What a fill did, in examples."""

    identity: Identity
    rows: int
    computed: int
    seconds: float

    @property
    def reused(self) -> int:
        """Those that were in the cache."""
        return self.rows - self.computed


def reference_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the reference model: of `ref` if there is one, else of the policy's start."""
    if recipe.ref is None:
        return recipe
    # Made anew: the policy's adapter, quantisation and revision are none of the reference's.
    return Recipe(
        model=recipe.ref,
        adapter=recipe.ref_adapter,
        load_in_4bit=recipe.ref_load_in_4bit,
        dtype=recipe.dtype,
        device=recipe.device,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
    )


def wanted_words(recipe: Recipe) -> int | None:
    """How many of the reference's words the loss wants for each token, if any."""
    return recipe.top_k if recipe.signature.soft else None


def identity_of(recipe: Recipe, store: Store, told: Callable[[int, int], None] = lambda *_: None) -> Identity | None:
    """The identity of a recipe's model with the adapter that it starts from; None if its files are not here yet.

    told(done_bytes, total_bytes) is called while weights are digested.
    """
    found = origin(recipe)
    if found is None:
        return None
    weights = files_digest(found.folder, store, told)
    start = adapters.continued_from(recipe)
    adapter = None if start is None else tensors_digest(*adapters.content(start))
    names = {"model": recipe.model, "adapter_name": None if start is None else str(start)}
    return Identity(weights, found.quantisation, found.dtype, adapter, remote_code=found.remote_code, **names)


def identity_of_loaded(recipe: Recipe, model: Model, store: Store) -> Identity:
    """The identity of a model that was loaded: of the commit that it came in, whatever the hub's copy is now."""
    commit = unwrapped(model).config._commit_hash
    identity = identity_of(recipe if commit is None else recipe.model_copy(update={"revision": commit}), store)
    if identity is None:
        raise ModelError(f"{recipe.model}: its files cannot be found again, so their digest cannot be told.")
    return identity


def by_policy(
    recipe: Recipe,
    store: Store,
    examples: Sequence[TokenExample],
    model: Model,
    layout: Layout,
    path: ForwardPath,
    told: Told,
) -> Filled:
    """Fill from the policy as it stands before step 1: a new adapter switched off, whole weights as they were loaded.

    An adapter that it goes on from stays on.
    """
    started = time.perf_counter()
    identity = identity_of_loaded(recipe, model, store)
    new_adapter = isinstance(model, PeftModel) and adapters.continued_from(recipe) is None
    with model.disable_adapter() if new_adapter else nullcontext():
        computed = _fill(store, identity, examples, model, layout, path, recipe, told)
    return Filled(identity, len(examples), computed, time.perf_counter() - started)


def by_model(
    recipe: Recipe,
    store: Store,
    examples: Sequence[TokenExample],
    tokenizer: PreTrainedTokenizerBase,
    told: Told,
    stage: Callable[[str], None],
) -> Filled:
    """Fill by loading the reference's model, and only if something is missing; it is freed before this returns.

    Raises ModelError if its vocabulary is not the tokenizer's.
    """
    started = time.perf_counter()
    recipe_of_it = reference_recipe(recipe)
    if recipe.ref is not None:
        load.require_there(recipe_of_it, "ref")
    if recipe.ref is not None:
        require_same_words(recipe_of_it, tokenizer)
    identity = identity_of(recipe_of_it, store)
    computed = 0
    if identity is None or missing(store, identity, examples, top_k=wanted_words(recipe)):
        stage(f"loading {recipe_of_it.model} as the reference")
        model = loaded(recipe_of_it)
        # Once more: the hub may have had a newer model than the copy that was looked at.
        identity = identity_of_loaded(recipe_of_it, model, store)
        path, chosen = layouts.path_of(recipe), layouts.layout_of(recipe, model)
        if recipe.self_check:
            chosen = selfcheck.choose_layout(model, examples, chosen, path)
        else:
            install(model, padded=chosen.padded)
        stage("reading the reference's log-probs")
        computed = _fill(store, identity, examples, model, chosen, path, recipe, told)
        del model
        free()
    return Filled(identity, len(examples), computed, time.perf_counter() - started)


def free() -> None:
    """Give back what a model that is no longer needed took."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _fill(
    store: Store,
    identity: Identity,
    examples: Sequence[TokenExample],
    model: Model,
    layout: Layout,
    path: ForwardPath,
    recipe: Recipe,
    told: Told,
) -> int:
    words = wanted_words(recipe)
    if words and words > (known := len(head_of(model).weight)):
        raise RecipeError(f"top_k = {words}: the reference knows {known} words. Take at most that many.")
    lacking = missing(store, identity, examples, top_k=words)
    computed = fill(
        store,
        identity,
        examples,
        model,
        layout,
        path,
        top_k=words,
        lacking=lacking,
        done=lambda count: told(count, len(lacking)),
    )
    if computed and (gone := missing(store, identity, examples, top_k=words)):
        raise CacheError(
            f"{store.path}: {len(gone)} of {len(examples)} rows are not there though they were computed: somebody "
            "pruned or damaged the cache meanwhile. The same command computes what is missing."
        )
    return computed


def loaded(recipe: Recipe) -> Model:
    """The recipe's model, with the adapter that it goes on from if it names one."""
    model = load.load_model(recipe)
    if adapters.continued_from(recipe) is None:
        return model
    return adapters.attach(model, recipe)


def require_same_words(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """A reference that means other words by the same ids would be read without any error, and mean nothing."""
    other = load.load_tokenizer(recipe)
    mine, theirs = tokenizer.get_vocab(), other.get_vocab()
    different = sorted(word for word in mine if theirs.get(word) != mine[word])
    if different:
        raise ModelError(
            f"ref = {recipe.model!r}: {len(different)} of {len(mine)} words have other ids than in the policy's "
            f"tokenizer, such as {different[0]!r}. Expected a model with the same tokenizer."
        )
