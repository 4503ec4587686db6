"""A small Llama trained from scratch or further: the model, its loss, and a training under any optimizer.

A step is `packs` backward passes, one clip, one update. The rate goes up over the first tenth of the steps and down
along a cosine to a tenth of its peak. What is timed is the steps alone, the update apart; validation is not.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from corpus import Corpus
from measuring import Found
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

WARM_UP, LAST_RATE = 0.1, 0.1  # of the steps; of the peak
CLIP = 1.0
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a step."""

    width: int = 160
    layers: int = 4
    vocabulary: int = 2048
    packs: int = 4
    sequences: int = 2  # of a pack
    length: int = 128  # tokens of a sequence

    @property
    def hidden(self) -> int:
        """Width of the MLP: 2.8 times the model's, in 32s."""
        return round(2.8 * self.width / 32) * 32

    @property
    def heads(self) -> int:
        """Of 64 dimensions, but four at least."""
        return max(4, self.width // 64)

    def model(self, seed: int, device: torch.device) -> LlamaForCausalLM:
        """A model with random weights in fp32; embedding and head are apart."""
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            max_position_embeddings=self.length, tie_word_embeddings=False, use_cache=False,
        )  # fmt: skip
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(device)


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of the blocks, by name."""
    for name, module in model.named_modules():
        if name.split(".")[-1] in MATRICES:
            yield name, module


def rest(model: nn.Module) -> list[nn.Parameter]:
    """Embedding, head and norms."""
    own = {id(module.weight) for _, module in matrices(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in own]


def loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each token after the first, nats; ids (B, T)."""
    logits = model(input_ids=ids).logits[:, :-1]  # (B, T - 1, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, corpus: Corpus, sequences: int = 16) -> float:
    """Over all that is held out, so many sequences at a time."""
    device = next(model.parameters()).device
    batches = corpus.validation.to(device).split(sequences)
    return sum(loss(model, ids).item() * len(ids) for ids in batches) / len(corpus.validation)


def share(step: int, steps: int) -> float:
    """Of its peak, the rate in a step, the first of which is 0."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


@dataclass
class Training:
    """A model on its way: `update` clips, takes the step at a share of the peak rates and drops the gradients."""

    model: LlamaForCausalLM
    corpus: Corpus
    shape: Shape
    seed: int
    update: Callable[[float], float]  # share -> norm before it was clipped
    losses: list[float] = field(default_factory=list)  # of each step, in training
    norms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    update_seconds: float = 0.0

    def step(self, number: int, steps: int) -> None:
        """One of `steps`."""
        self._settle()
        start, cpu = time.perf_counter(), time.process_time()
        self.losses.append(self.backward(number))
        self._settle()
        middle = time.perf_counter()
        self.norms.append(self.update(share(number, steps)))
        self._settle()
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu
        self.update_seconds += time.perf_counter() - middle

    def backward(self, number: int) -> float:
        """Gradients of a step's packs, summed where the optimizer sums them; the mean loss."""
        shape, total = self.shape, 0.0
        packs = self.corpus.packs(self.seed, number, (shape.packs, shape.sequences, shape.length))
        for ids in packs.to(self._device()):
            own = loss(self.model, ids) / shape.packs
            own.backward()
            total += own.item()
        return total

    def run(self, steps: int, evaluations: int, told: Callable[[int], None]) -> Found:
        """So many steps, validated on at the end and at as many even places as asked for; what came of it."""
        curve: list[tuple[int, float]] = []
        for number in range(steps):
            self.step(number, steps)
            if (number + 1) * evaluations // steps > number * evaluations // steps:
                curve.append((number + 1, validation_loss(self.model, self.corpus)))
            told(number + 1)
        return {
            "final": curve[-1][1], "curve": curve, "losses": [round(one, 4) for one in self.losses],
            "norms": [round(one, 4) for one in self.norms], "seconds": self.seconds, "cpu_seconds": self.cpu_seconds,
            "update_seconds": self.update_seconds,
        }  # fmt: skip

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _settle(self) -> None:
        if self._device().type == "cuda":
            torch.cuda.synchronize()
