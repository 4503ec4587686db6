"""A run or a model that speaks, through transformers, with the tokenizer, template and stop tokens it was trained with.

With `compare` a run speaks twice: with its adapter, and with the adapter switched off, which costs no memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lite.attention.branch_attention import plain_attention
from lite.data.problems import BadRow
from lite.data.template import Template, encode, read_template, render
from lite.errors import ModelError
from lite.merge.companions import stop_tokens
from lite.merge.source import Source, source_of
from lite.model import load
from lite.recipe import Recipe
from lite.serve.conversation import Sampling, Turns

TUNED, BASE = "tuned", "base"
BROKEN = "\ufffd"  # what an unfinished character decodes to


@dataclass(frozen=True)
class ModelSpeaker:
    """A model that transformers has loaded."""

    name: str
    context: int
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    stop_ids: Sequence[int]
    adapted: bool = True  # whether its adapter, if it has one, is on

    @property
    def plain(self) -> bool:
        """Whether it has no chat template."""
        return self.template.source is None

    def tokens(self, turns: Turns) -> int:
        """How many tokens the conversation is as a prompt."""
        return len(self._prompt(turns))

    def answer(self, turns: Turns, sampling: Sampling) -> Iterator[str]:
        """The answer, piece by piece as it comes; closing the iterator ends it."""
        yield from text_of(self.tokenizer, self._words(self._prompt(turns), sampling))

    def _prompt(self, turns: Turns) -> list[int]:
        """Ids; of a model that knows no turns, their texts one after the other, as in training."""
        if self.template.source is None:
            return [*self.template.bos, *encode(self.tokenizer, ["".join(turn["content"] for turn in turns)])[0]]
        try:
            text = render(self.tokenizer, self.template.source, turns, generation_prompt=True)
        except BadRow as error:
            raise ModelError(str(error).replace("Change the row, or give", "Give")) from None
        return encode(self.tokenizer, [text])[0]

    def _words(self, prompt: list[int], sampling: Sampling) -> Iterator[int]:
        """Token by token, until one that ends the answer."""
        device = self.model.device
        generator = torch.Generator(device)
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        ids, cache = torch.tensor([prompt], device=device), DynamicCache(config=self.model.config)
        for _ in range(min(sampling.max_tokens, self.context - len(prompt))):
            with torch.inference_mode(), self._as_asked():
                how: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
                logits = self.model(input_ids=ids, **how).logits[0, -1].float()  # (V,)
                word = _chosen(logits, sampling, generator)
            if word in self.stop_ids:
                return
            yield word
            ids = torch.tensor([[word]], device=device)

    def _as_asked(self) -> Any:
        off = isinstance(self.model, PeftModel) and not self.adapted
        return self.model.disable_adapter() if off else nullcontext()


@contextmanager
def speaking(
    name: str, *, compare: bool = False, base: str | None = None, machine: dict[str, Any] | None = None
) -> Iterator[list[ModelSpeaker]]:
    """A run, an adapter's folder or a model, loaded; with `compare` its base beside it, first.

    base: where the base lies, if not where the run says. machine: settings of Recipe that say where and in what to
    compute. Raises ModelError if there is nothing to compare with, and what `source_of` and loading raise.
    """
    source = source_of(name, base=base)
    if compare and source.adapter is None:
        raise ModelError(
            f"--compare: {name} has no adapter to switch off: a whole model is there. Talk to what it was made of by "
            "itself, `lite chat MODEL`; or compare their numbers, `lite score --run RUN --ref start`."
        )
    tokenizer = AutoTokenizer.from_pretrained(str(source.files))
    template = read_template(tokenizer)
    model = _loaded(source, machine or {})
    context = model.config.get_text_config().max_position_embeddings
    tuned = ModelSpeaker(TUNED if compare else source.name, context, model, tokenizer, template, stop_tokens(source))
    with plain_attention(model):
        if compare:
            off = ModelSpeaker(BASE, context, model, tokenizer, template, tuned.stop_ids, adapted=False)
            yield [off, tuned]
        else:
            yield [tuned]


def _loaded(source: Source, machine: dict[str, Any]) -> PreTrainedModel | PeftModel:
    trained = source.recipe
    settings = {key: getattr(trained, key) for key in ("dtype", "load_in_4bit", "load_in_8bit")} if trained else {}
    settings |= {"trust_remote_code": trained.trust_remote_code} if trained else {}
    recipe = Recipe(**{**settings, "model": str(source.base), **machine})
    model: PreTrainedModel | PeftModel = load.load_model(recipe)
    if source.adapter is not None:
        model = PeftModel.from_pretrained(model, str(source.adapter))
    return model.eval()


def _chosen(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    chances, words = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    # The likeliest words whose chances together reach top_p; the first of them always.
    kept = chances.cumsum(-1) - chances < sampling.top_p
    return int(words[torch.multinomial(chances * kept, 1, generator=generator)])


def text_of(tokenizer: PreTrainedTokenizerBase, words: Iterator[int]) -> Iterator[str]:
    """What the tokens say, each piece as soon as its characters are whole."""
    said: list[int] = []
    shown = ""
    for word in words:
        said.append(word)
        # All of it anew: how a token reads may depend on those before it.
        text = tokenizer.decode(said, skip_special_tokens=True)
        if not text.endswith(BROKEN) and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(said, skip_special_tokens=True)[len(shown) :]
    if rest:
        yield rest
