"""Trials: dry runs of a few layers under given settings, each skeleton and each outcome made once."""

import functools
from dataclasses import dataclass, replace

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lite.device import meta_stands_for
from lite.engine.layout import layout_of, path_of
from lite.engine.optimizer import subspaces
from lite.memory.checkpoint import dequantises
from lite.memory.levers import Levers, pull, recompute
from lite.memory.meter import frozen_tensors
from lite.model import matrices
from lite.model.head import unwrapped
from lite.model.layers import decoder_layers
from lite.model.trained import Trained
from lite.plan import dry_run, lengths, refreshes, skeleton
from lite.plan.dry_run import Outcome
from lite.plan.law import Law, law
from lite.plan.target import Target
from lite.recipe import Recipe


@dataclass(frozen=True)
class Settings:
    """What the planner chooses: the layout, the head's chunk, and the levers."""

    tokens_per_pack: int
    chunk_tokens: int
    split_pairs: bool = False
    levers: Levers = Levers()  # noqa: RUF009, a frozen dataclass

    def into(self, recipe: Recipe) -> Recipe:
        """The recipe with these settings."""
        return recipe.model_copy(
            update={
                "tokens_per_pack": self.tokens_per_pack,
                "chunk_tokens": self.chunk_tokens,
                "split_pairs": self.split_pairs,
                **vars(self.levers),
            }
        )


class Trials:
    """Runs steps of the recipe's model with a few layers."""

    def __init__(self, recipe: Recipe, config: PreTrainedConfig, rows: lengths.Lengths, target: Target) -> None:
        self.recipe, self.config, self.rows, self.target = recipe, config, rows, target
        self.layers = skeleton.layers_of(config)
        self._skeletons: dict[tuple[object, ...], Trained] = {}
        self._laws: dict[tuple[object, ...], Law] = {}
        self._outcomes: dict[tuple[object, ...], Outcome] = {}
        self.runs = 0

    @property
    def comfortable_tokens(self) -> int:
        """Of a pack where memory is no matter."""
        return 32_768 if self.target.device_type == "cuda" else 8192

    def at_least_bytes(self, tokens: int) -> int:
        """Less than a step without recomputation can take: the weights, and of each layer and token four vectors."""
        width = self.config.get_text_config().hidden_size * self.target.dtype.itemsize
        return sum(self.static().values()) + 4 * self.layers * tokens * width

    def law(self, settings: Settings, tokens: int, *, kept: bool = True, recomputed: bool = True) -> Law:
        """The law of a pack of `tokens` under settings whose layer counts are left open."""
        key = (settings, tokens, kept, recomputed)
        if key not in self._laws:
            streamed = settings.levers.layers_on_host > 0
            in_flight = settings.levers.offload_checkpoints

            def run(r: int, p: int) -> Outcome:
                levers = replace(settings.levers, recompute_layers=r, layers_on_host=r if streamed else 0)
                return self.outcome(replace(settings, levers=levers), tokens, layers=r + p)

            keeps = settings.levers.keep_weights
            least = 3 if in_flight else 2 if streamed or keeps else 1
            found = law(run, tokens, least=least, kept=kept, recomputed=recomputed)
            if self.recipe.optimizer == "galore":
                found = found.holding(self.refreshes_bytes(), "gradients")
            if keeps and kept and recomputed:
                plain = replace(settings, levers=replace(settings.levers, keep_weights=False))
                found = replace(found, at_least=self.law(plain, tokens))
            self._laws[key] = found
        return self._laws[key]

    def outcome(self, settings: Settings, tokens: int, *, layers: int | None = None) -> Outcome:
        """A step with one pack of `tokens` (two, where a pair is split) on so many layers, or on all of them."""
        key = (settings, tokens, layers)
        if key not in self._outcomes:
            self._outcomes[key] = self._outcome(settings, tokens, layers)
        return self._outcomes[key]

    def _outcome(self, settings: Settings, tokens: int, layers: int | None) -> Outcome:
        self.runs += 1
        recipe, device_type = settings.into(self.recipe), self.target.device_type
        with meta_stands_for(device_type):
            model = self._skeleton(settings.levers, layers)
            layout = replace(layout_of(recipe, model), padded=False, tokens_per_pack=tokens)
            batch = lengths.batch_of(self.rows, layout, tokens)
            card = self.target.card
            path, whole = path_of(recipe), layers is None
            # Laws of short and long packs are of one kind: which steps are of one pack is known where all is chosen.
            later = recipe.batch_size > 1 and (not whole or self.rows.most_tokens > tokens)
            return dry_run.dry_run(
                model, batch, recipe, path, card=card, device_type=device_type, refreshing=whole, later=later
            )

    def static(self) -> dict[str, int]:
        """Bytes of the weights, an adapter's left out: of the layers, the input embedding, the head, and the rest."""
        with meta_stands_for(self.target.device_type):
            model = self._skeleton(Levers(), 2)
        base, whole = unwrapped(model), not isinstance(model, PeftModel)
        embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
        per_layer = [_weight_bytes(layer, whole=whole) for layer in decoder_layers(model).values()]
        total = _weight_bytes(model, whole=whole)
        tied = embedding is head
        found = {"embedding": embedding.nbytes, "head": 0 if tied else head.nbytes}
        rest = total - sum(per_layer) - sum(found.values())
        return {"layers": per_layer[-1] * self.layers, **found, "rest": rest}

    @functools.cached_property
    def quantised(self) -> bool:
        """Whether products of the layers dequantise a frozen weight."""
        with meta_stands_for(self.target.device_type):
            return dequantises(self._skeleton(Levers(), 2))

    def refreshes_bytes(self) -> int:
        """What GaLore's refreshes add in the heaviest step of a run; of the whole model, from the shapes of a layer."""
        settings = subspaces(self.recipe)
        with meta_stands_for(self.target.device_type):
            model = self._skeleton(Levers(), 2)
        found = {n: refreshes.Shape.of(m) for n, m in matrices.matrices(model).items() if m.short > settings.rank}
        first, last = (f"{name}." for name in decoder_layers(model))
        names = list(found)
        start = next((i for i, name in enumerate(names) if name.startswith(first)), 0)
        of_layer = [shape for name, shape in found.items() if name.startswith(last)]
        before = [found[name] for name in names[:start]]
        after = [found[name] for name in names[start + 2 * len(of_layer) :]]
        shapes = [*before, *of_layer * self.layers, *after]
        return refreshes.heaviest(shapes, settings, self.target.dtype)[1]

    def _skeleton(self, levers: Levers, layers: int | None) -> Trained:
        # What these levers do to a model cannot be undone; recomputation is set anew each time.
        key = (layers, levers.embedding_on_host, levers.mlp_tile_tokens, levers.layers_on_host)
        if key not in self._skeletons or layers is None:
            model = skeleton.skeleton(self.recipe, self.config, self.target.dtype, layers=layers)
            pull(model, levers)
            if layers is None:
                return model
            self._skeletons[key] = model
        else:
            recompute(self._skeletons[key], levers)
        return self._skeletons[key]


def _weight_bytes(model: nn.Module, *, whole: bool) -> int:
    """Of what is not trained, where `whole` of all weights; each tensor once however many names it has."""
    tensors: list[Tensor] = [*frozen_tensors(model), *(model.parameters() if whole else ())]
    return sum({t.untyped_storage()._cdata: t.nbytes for t in tensors}.values())
