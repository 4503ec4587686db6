"""The catalogue: short names of models, and their shapes, known without a network.

A shape is what memory and speed depend on. `parameters` follows from it and equals the published count; a model
whose figures are not certain is left out, for a wrong shape makes a wrong plan.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lite.errors import ModelError
from lite.recipe import BUNDLED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BUNDLED_MODEL = Path(__file__).parent.parent / "bundled" / "model"


@dataclass(frozen=True)
class Shape:
    """A causal language model's sizes, in the words of its config.json."""

    hub: str  # name on the hub
    model_type: str  # architecture, as transformers names it
    layers: int
    hidden_size: int
    intermediate_size: int  # of the dense MLP; in a mixture, of one expert
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False  # the head is the embedding
    experts: int = 0  # 0: no mixture
    experts_per_token: int = 0
    sliding_window: int | None = None  # tokens that the local layers see

    @property
    def parameters(self) -> int:
        """How many weights the model has; a tied head is counted once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return embeddings + self.layers * (self.matrix_parameters + self._vector_parameters) + self.hidden_size

    @property
    def matrix_parameters(self) -> int:
        """Weights in the matrices of one layer: what quantisation shrinks."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden_size * (2 * queries + 2 * keys)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return attention + (self.experts * (mlp + self.hidden_size) if self.experts else mlp)

    @property
    def _vector_parameters(self) -> int:
        norms = (4 if self.model_type.startswith("gemma") else 2) * self.hidden_size
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.model_type == "qwen2" else 0
        head_norms = 2 * self.head_dim if self.model_type in ("qwen3", "qwen3_moe", "gemma3_text") else 0
        return norms + biases + head_norms


def _qwen2(size: str, *sizes: int, vocab_size: int = 152_064, tied: bool = False) -> Shape:
    return Shape(f"Qwen/Qwen2.5-{size}-Instruct", "qwen2", *sizes, 128, vocab_size, tied)


def _qwen3(size: str, *sizes: int, tied: bool = False) -> Shape:
    return Shape(f"Qwen/Qwen3-{size}", "qwen3", *sizes, 128, 151_936, tied)


def _llama(name: str, *sizes: int, head_dim: int = 128, tied: bool = False) -> Shape:
    return Shape(f"meta-llama/{name}", "llama", *sizes, head_dim, 128_256, tied)


# layers, hidden, intermediate, heads, kv heads [, head_dim, vocabulary]
CATALOG: dict[str, Shape] = {
    "qwen2.5-0.5b": dataclasses.replace(
        _qwen2("0.5B", 24, 896, 4864, 14, 2, vocab_size=151_936, tied=True), head_dim=64
    ),
    "qwen2.5-1.5b": _qwen2("1.5B", 28, 1536, 8960, 12, 2, vocab_size=151_936, tied=True),
    "qwen2.5-3b": _qwen2("3B", 36, 2048, 11008, 16, 2, vocab_size=151_936, tied=True),
    "qwen2.5-7b": _qwen2("7B", 28, 3584, 18944, 28, 4),
    "qwen2.5-14b": _qwen2("14B", 48, 5120, 13824, 40, 8),
    "qwen2.5-32b": _qwen2("32B", 64, 5120, 27648, 40, 8),
    "qwen2.5-72b": _qwen2("72B", 80, 8192, 29568, 64, 8),
    "qwen3-0.6b": _qwen3("0.6B", 28, 1024, 3072, 16, 8, tied=True),
    "qwen3-1.7b": _qwen3("1.7B", 28, 2048, 6144, 16, 8, tied=True),
    "qwen3-4b": _qwen3("4B", 36, 2560, 9728, 32, 8, tied=True),
    "qwen3-8b": _qwen3("8B", 36, 4096, 12288, 32, 8),
    "qwen3-14b": _qwen3("14B", 40, 5120, 17408, 40, 8),
    "qwen3-32b": _qwen3("32B", 64, 5120, 25600, 64, 8),
    "qwen3-30b-a3b": Shape(
        "Qwen/Qwen3-30B-A3B", "qwen3_moe", 48, 2048, 768, 32, 4, 128, 151_936, experts=128, experts_per_token=8
    ),
    "llama-3.2-1b": _llama("Llama-3.2-1B-Instruct", 16, 2048, 8192, 32, 8, head_dim=64, tied=True),
    "llama-3.2-3b": _llama("Llama-3.2-3B-Instruct", 28, 3072, 8192, 24, 8, tied=True),
    "llama-3.1-8b": _llama("Llama-3.1-8B-Instruct", 32, 4096, 14336, 32, 8),
    "llama-3.3-70b": _llama("Llama-3.3-70B-Instruct", 80, 8192, 28672, 64, 8),
    "mistral-7b": Shape("mistralai/Mistral-7B-Instruct-v0.3", "mistral", 32, 4096, 14336, 32, 8, 128, 32_768),
    "mistral-nemo-12b": Shape("mistralai/Mistral-Nemo-Instruct-2407", "mistral", 40, 5120, 14336, 32, 8, 128, 131_072),
    "mixtral-8x7b": Shape(
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        "mixtral",
        *(32, 4096, 14336, 32, 8, 128, 32_000),
        experts=8,
        experts_per_token=2,
    ),
    "gemma-2-2b": Shape(
        "google/gemma-2-2b-it", "gemma2", 26, 2304, 9216, 8, 4, 256, 256_000, True, sliding_window=4096
    ),
    "gemma-2-9b": Shape(
        "google/gemma-2-9b-it", "gemma2", 42, 3584, 14336, 16, 8, 256, 256_000, True, sliding_window=4096
    ),
    "gemma-2-27b": Shape(
        "google/gemma-2-27b-it", "gemma2", 46, 4608, 36864, 32, 16, 128, 256_000, True, sliding_window=4096
    ),
    "gemma-3-1b": Shape(
        "google/gemma-3-1b-it", "gemma3_text", 26, 1152, 6912, 4, 1, 256, 262_144, True, sliding_window=512
    ),
    "phi-3-mini": Shape(
        "microsoft/Phi-3-mini-4k-instruct", "phi3", 32, 3072, 8192, 32, 32, 96, 32_064, sliding_window=2047
    ),
    "phi-4-14b": Shape("microsoft/phi-4", "phi3", 40, 5120, 17920, 40, 10, 128, 100_352),
    "granite-3.1-2b": Shape("ibm-granite/granite-3.1-2b-instruct", "granite", 40, 2048, 8192, 32, 8, 64, 49_155, True),
    "granite-3.1-8b": Shape(
        "ibm-granite/granite-3.1-8b-instruct", "granite", 40, 4096, 12800, 32, 8, 128, 49_155, True
    ),
}
# Other names of the same models: the size alone means the generation that most recipes are written for.
CATALOG |= {
    short: CATALOG[full]
    for short, full in {
        "qwen-0.5b": "qwen2.5-0.5b",
        "qwen-1.5b": "qwen2.5-1.5b",
        "qwen-3b": "qwen2.5-3b",
        "qwen-7b": "qwen2.5-7b",
        "qwen-14b": "qwen2.5-14b",
        "qwen-32b": "qwen2.5-32b",
        "qwen-72b": "qwen2.5-72b",
        "llama-1b": "llama-3.2-1b",
        "llama-3b": "llama-3.2-3b",
        "llama-8b": "llama-3.1-8b",
        "llama-70b": "llama-3.3-70b",
    }.items()
}


def resolve(name: str) -> str:
    """Where a model's files are: an alias becomes its hub name, `bundled` its folder, the rest stays as it is.

    A folder with a config.json wins over an alias of the same name. Raises ModelError for a word that is none of these.
    """
    if name == BUNDLED:
        return str(BUNDLED_MODEL)
    if (Path(name) / "config.json").is_file():
        return name
    if name.lower() in CATALOG:
        return CATALOG[name.lower()].hub
    if "/" in name or Path(name).is_dir():
        return name
    near = difflib.get_close_matches(name.lower(), CATALOG, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    raise ModelError(
        f"model = {name!r}: no such folder or alias.{meant} "
        f"Expected a folder, a hub name such as Qwen/Qwen2.5-14B-Instruct, or one of {', '.join(sorted(CATALOG))}."
    )


def shape_of(name: str) -> Shape | None:
    """The shape of a model by alias or hub name; None of a folder and of what the catalogue has not."""
    if (Path(name) / "config.json").is_file():
        return None
    by_hub = {shape.hub: shape for shape in CATALOG.values()}
    return CATALOG.get(name.lower()) or by_hub.get(name)


def config(shape: Shape) -> "PreTrainedConfig":
    """A transformers config of this shape, for plans and benchmarks without a download.

    Sizes only: rotary base, scales and special tokens are transformers' defaults. Weights need their own config.
    """
    from transformers import AutoConfig

    sizes = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
        "sliding_window": shape.sliding_window,
        "use_cache": False,
        # Their defaults may lie outside a smaller vocabulary, which configs refuse.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    }
    if shape.experts:
        width = "num_local_experts" if shape.model_type == "mixtral" else "num_experts"
        sizes |= {width: shape.experts, "num_experts_per_tok": shape.experts_per_token}
        sizes |= {"moe_intermediate_size": shape.intermediate_size} if shape.model_type != "mixtral" else {}
    return AutoConfig.for_model(shape.model_type, **sizes)
