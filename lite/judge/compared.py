"""Comparing: the log-probs of another model, or of the judged one before its adapter, from the cache or into it."""

from collections.abc import Sequence
from contextlib import nullcontext

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lite.data.examples import TokenExample
from lite.judge.model import Judge, by_names, loaded
from lite.judge.subject import Subject
from lite.model import adapters
from lite.model.origin import origin
from lite.recipe import Recipe
from lite.reference import precompute
from lite.reference.fill import fill, missing
from lite.reference.lookup import Cached
from lite.reference.precompute import identity_of
from lite.reference.store import Store
from lite.train.progress import Progress


def read_apart(
    subject: Subject, store: Store, examples: Sequence[TokenExample], tokenizer: PreTrainedTokenizerBase, tell: Progress
) -> Cached | None:
    """The reference's log-probs of the examples, all of them in the cache; its model is read and freed, if need be.

    None where it is the judged model without its adapter, and something is missing: then that one is to be read
    (`read_beneath`), for its weights are needed anyway. Raises ModelError if it does not mean the same by token ids.
    """
    reference = subject.reference
    assert reference is not None
    precompute.require_same_words(reference, tokenizer)
    identity = identity_of(reference, store)
    if identity and not missing(store, identity, examples, top_k=None):
        tell.note(f"reference: {identity.description}, all in {store.path}")
        return Cached(store, identity)
    if _beneath(subject.recipe, reference):
        return None
    judge = loaded(reference, examples, tell)
    cached = _filled(reference, store, examples, judge, tell)
    del judge
    precompute.free()
    return cached


def read_beneath(
    subject: Subject, store: Store, examples: Sequence[TokenExample], judge: Judge, tell: Progress
) -> Cached:
    """The same of the judged model with its adapter switched off."""
    assert subject.reference is not None
    model = judge.model
    with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        return _filled(subject.reference, store, examples, judge, tell)


def _beneath(recipe: Recipe, reference: Recipe) -> bool:
    """Whether the reference is the judged model's base with no adapter."""
    here, there = origin(recipe), origin(reference)
    if adapters.continued_from(reference) is not None:
        return False
    return here == there if here and there else recipe.model == reference.model


def _filled(reference: Recipe, store: Store, examples: Sequence[TokenExample], judge: Judge, tell: Progress) -> Cached:
    identity = precompute.identity_of_loaded(reference, judge.model, store)
    tell.stage("reading the reference's log-probs")
    total, done = len(missing(store, identity, examples, top_k=None)), 0
    for names, alike in by_names(examples).items():
        group = [examples[i] for i in alike]

        def count(computed: int, before: int = done) -> None:
            tell.rows(before + computed, total)

        done += fill(store, identity, group, judge.model, judge.layout_of(names), judge.path, done=count)
    tell.note(f"reference: {identity.description}, {done} rows computed, the others found in {store.path}")
    return Cached(store, identity)
