"""Weights: a base and an adapter as one model, read by rows and never in memory together."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lite.errors import ExportError, raise_collected
from lite.merge import names
from lite.merge.adapter import Adapter
from lite.merge.update import Update
from lite.model.shards import Weights

ANOTHER = "Expected the base that it was trained on: see base_model_name_or_path in its adapter_config.json."
RENAMED = (
    "All else fits. Either the adapter was trained on another base, or on tensors to which transformers gives other\n"
    "names when it loads the model (as a Mixtral's router and experts), and which are not merged here: leave them out\n"
    "of target_modules and modules_to_save, or let peft merge them, by `merge_and_unload`."
)


class Merged:
    """A base and an adapter as one model: fp32 where the adapter reaches, as stored elsewhere.

    A tied model whose head and embedding were trained apart has a head of its own, and `untied` is True.
    """

    def __init__(self, base: Weights, adapter: Adapter) -> None:
        """Raises ExportError with both shapes for each tensor of the adapter that has no place in the base."""
        self._base = base
        self._updates: dict[str, Update] = {}
        self._sources: dict[str, str] = {}  # of tensors that the base has under another's name: a tied one
        self.untied = False
        problems, absent = [], []
        for live, update in adapter.updates.items():
            name = self._place(live)
            if name is None:
                absent.append(f"{live}: the base has no such tensor")
                continue
            shape = base.shapes[self._sources.get(name, name)]
            problems += [f"{name} {shape}: {problem}" for problem in update.misfits(shape)]
            problems += [f"{live}: {name} is another's already"] if name in self._updates else []
            self._updates[name] = update
        if self._updates and not problems:
            raise_collected(ExportError, f"{adapter.folder}: not all of the adapter has a place here:", absent, RENAMED)
        problems += absent
        raise_collected(ExportError, f"{adapter.folder}: the adapter belongs to another base:", problems, ANOTHER)
        self._settle_ties(adapter)
        own = {name: base.shapes[source] for name, source in self._sources.items()}
        self._shapes = {**base.shapes, **own}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The base's tensors; last a head of its own, where there is a new one."""
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the base's tensor."""
        return self._base.dtype(self._sources.get(name, name))

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first axis: in fp32 where something was added, else in `dtype`."""
        rows = self._base.rows(self._sources.get(name, name), start, stop)
        update = self._updates.get(name)
        return rows if update is None else update.applied(rows, start)

    def _place(self, live: str) -> str | None:
        """The tensor's name in the merged model; a tied one that the base lacks gets the other's as its source."""
        name = names.place(live, self._base.shapes)
        if name is None and (live.endswith(names.HEAD) or live.endswith(names.EMBEDDING)):
            head = live.endswith(names.HEAD)
            other = names.place(names.EMBEDDING if head else names.HEAD, self._base.shapes)
            if other is not None:
                name = names.tied_head(other) if head else names.tied_embedding(other, self._base.shapes)
                self._sources[name] = other
        return name

    def _settle_ties(self, adapter: Adapter) -> None:
        """Find whether a tied head goes with the embedding or apart from it, as peft's live model has it."""
        embedding, head = self._ends()
        mine, other = self._updates.get(embedding), self._updates.get(head)
        if (mine is None and other is None) or not self._were_tied(embedding, head):
            return
        together = mine is not None and (adapter.ties or (mine.tokens is not None and other is None))
        if together or (mine is not None and other is not None and self._same(embedding, head)):
            # One tensor for both, unless the base has each by its own name.
            if self._sources.pop(head, None) is None and head in self._base.shapes:
                self._updates[head] = mine
            else:
                self._updates.pop(head, None)
            return
        self.untied = True
        for name, source in ((head, embedding), (embedding, head)):
            if name not in self._base.shapes:
                self._sources[name] = source

    def _ends(self) -> tuple[str, str]:
        """The names of embedding and head, where the merged model has them or would have them."""
        present = self._base.shapes
        embedding, head = names.place(names.EMBEDDING, present), names.place(names.HEAD, present)
        embedding = embedding or names.tied_embedding(head or names.HEAD, present)
        head = head or names.tied_head(embedding)
        assert head != embedding, f"{embedding} is no embedding's name"
        return embedding, head

    def _were_tied(self, embedding: str, head: str) -> bool:
        # torch's files hold a tied tensor under both names; the values tell.
        shapes = self._base.shapes
        if embedding not in shapes or head not in shapes:
            return embedding in shapes or head in shapes
        return shapes[embedding] == shapes[head] and _equal(self._base, embedding, head)

    def _same(self, embedding: str, head: str) -> bool:
        mine, other = self._updates[embedding], self._updates[head]
        if any(update != Update(whole=update.whole) or update.whole is None for update in (mine, other)):
            return False
        return all(
            torch.equal(mine.whole.rows(start, start + 4096), other.whole.rows(start, start + 4096))
            for start in range(0, mine.whole.shape[0], 4096)
        )


def _equal(weights: Weights, one: str, other: str) -> bool:
    return all(
        torch.equal(weights.rows(one, start, start + 4096), weights.rows(other, start, start + 4096))
        for start in range(0, weights.shapes[one][0], 4096)
    )
