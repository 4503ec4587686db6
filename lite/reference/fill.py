"""Filling: the reference's log-probs of every completion that the cache does not hold yet.

Packs are planned from the examples asked for, in their order, whatever the cache holds: a fill that was killed and
taken up again runs the same packs, and leaves the same bytes, as one that was not. What is written is written by whole
packs every few seconds, so a kill costs those seconds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lite.data.examples import TokenExample
from lite.data.packing import lay_out
from lite.data.packs import Layout, Pack
from lite.engine.forward import Model, Path, gather, placed, scored_hidden, scored_tokens
from lite.loss.head import top_logps
from lite.model.head import head_of
from lite.reference.store import Row, Store, TopRow
from lite.reference.weights import Identity, completion_key

COMMIT_EVERY_S = 2.0
READ_AT_ONCE, TOPS_AT_ONCE = 4096, 64  # rows


def keys_of(example: TokenExample) -> tuple[bytes, ...]:
    """The cache's key of each completion."""
    return tuple(completion_key(example.prompt, completion) for completion in example.completions)


def missing(
    store: Store, identity: Identity, examples: Sequence[TokenExample], *, top_k: int | None
) -> list[TokenExample]:
    """The examples, each once, of which the cache lacks anything; top_k: words wanted of the first completion."""
    keys = {keys_of(example): example for example in examples}
    wanted = list({key for of_one in keys for key in of_one})
    lacking = store.missing(identity, wanted)
    # Read, not only looked for: a row whose checksum fails is found now, and not in the midst of the training.
    for some in _parts([key for key in wanted if key not in lacking], READ_AT_ONCE):
        lacking.update(set(some) - store.get(identity, some).keys())
    if top_k:
        firsts = list({of_one[0] for of_one in keys})
        without = store.missing_top(identity, top_k, firsts)
        for some in _parts([key for key in firsts if key not in without], TOPS_AT_ONCE):
            without.update(set(some) - store.get_top(identity, top_k, some).keys())
        lacking |= without
    return [example for of_one, example in keys.items() if not lacking.isdisjoint(of_one)]


def _parts(keys: list[bytes], size: int) -> Iterator[list[bytes]]:
    return (keys[start : start + size] for start in range(0, len(keys), size))


def groups(examples: Sequence[TokenExample], layout: Layout) -> Iterator[list[TokenExample]]:
    """The examples, each once, in their order, as many at a time as a pack holds."""
    group: list[TokenExample] = []
    tokens = 0
    for example in {keys_of(example): example for example in examples}.values():
        if group and tokens + example.tokens > layout.tokens_per_pack:
            yield group
            group, tokens = [], 0
        group.append(example)
        tokens += example.tokens
    if group:
        yield group


@torch.no_grad()
def fill(
    store: Store,
    identity: Identity,
    examples: Sequence[TokenExample],
    model: Model,
    layout: Layout,
    path: Path,
    *,
    top_k: int | None = None,
    lacking: Sequence[TokenExample] | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> int:
    """Compute and store what is missing of `examples`; the number of examples that were computed.

    The model must be as `identity` says. lacking: what `missing` just said, if it was asked already. done(count) is
    called after each pack with the examples computed so far.
    """
    if lacking is None:
        lacking = missing(store, identity, examples, top_k=top_k)
    if not lacking:
        return 0
    keys = {keys_of(example) for example in lacking}
    writing = _Writing(store, identity, top_k)
    training = model.training
    model.eval()
    computed = 0
    try:
        for group in groups(examples, layout):
            wanted = [example for example in group if keys_of(example) in keys]
            if wanted:
                writing.add(wanted, *_read(model, wanted, layout, path, top_k))
                computed += len(wanted)
                done(computed)
    finally:
        model.train(training)
        writing.commit()
    return computed


def _read(
    model: Model, examples: Sequence[TokenExample], layout: Layout, path: Path, top_k: int | None
) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """Per completion name the log-probs of each example; and of the first completion the likeliest words."""
    layout = replace(layout, scores=None)
    packs = placed(lay_out(examples, layout).packs, model)
    tokens, tops, ids = [], [], []
    for pack in packs:
        if top_k:
            logps, top, words = _with_top(model, pack, path, top_k)
            tops.append(top)
            ids.append(words)
        else:
            logps = scored_tokens(model, pack, path).logps
        tokens.append(logps)
    of_role = gather(tokens, packs)
    # From the examples: the offsets are on the device, and to ask them would wait for it.
    lengths = [[len(e.completions[c]) for e in examples] for c in range(len(layout.completions))]
    logps = [list(of_role[n].tokens.split(of_one)) for n, of_one in zip(layout.completions, lengths, strict=True)]
    if not top_k:
        return logps, []
    first = layout.completions[0]
    top_rows = gather(tops, packs)[first].tokens.split(lengths[0])
    id_rows = gather(ids, packs)[first].tokens.split(lengths[0])
    return logps, list(zip(top_rows, id_rows, strict=True))


def _with_top(model: Model, pack: Pack, path: Path, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    return top_logps(
        scored_hidden(model, pack, path), head_of(model), pack.labels, top_k, chunk_tokens=path.chunk_tokens
    )


class _Writing:
    """Rows on their way into the store: kept on the device until it is time to commit, so that nothing waits for it."""

    def __init__(self, store: Store, identity: Identity, top_k: int | None) -> None:
        self.store = store
        self.identity = identity
        self.top_k = top_k
        self.rows: list[Row] = []
        self.tops: list[TopRow] = []
        self.last_commit_s = time.monotonic()

    def add(
        self, examples: Sequence[TokenExample], logps: list[list[Tensor]], tops: list[tuple[Tensor, Tensor]]
    ) -> None:
        """Take in a pack's worth, and commit if the last time is some seconds ago."""
        for i, example in enumerate(examples):
            keys, place = keys_of(example), str(example.place)
            self.rows += [Row(key, of_role[i], place) for key, of_role in zip(keys, logps, strict=True)]
            if tops:
                self.tops.append(TopRow(keys[0], *tops[i], place))
        if time.monotonic() - self.last_commit_s >= COMMIT_EVERY_S:
            self.commit()

    def commit(self) -> None:
        """Write everything at once."""
        if self.tops:
            tops = [row._replace(logps=row.logps.cpu(), ids=row.ids.cpu()) for row in self.tops]
            self.store.put_top(self.identity, self.top_k, tops)
        if self.rows:
            self.store.put(self.identity, [row._replace(tokens=row.tokens.cpu()) for row in self.rows])
        self.rows, self.tops = [], []
        self.last_commit_s = time.monotonic()
