"""gemma: Gemma 1, 2 and 3. Its norms multiply by 1 + w, which the file holds; heads are those of the embedding."""

from collections.abc import Callable, Iterable, Iterator

import gguf

from lite.gguf.architectures import layers, numbers, refusals
from lite.gguf.architectures.architecture import Architecture, Config
from lite.gguf.planned import Planned

_TWO_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_FOUR_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_EVERY = {"gemma2": 2, "gemma3": 6}  # every so many layers, one attends to all: what llama.cpp takes for granted
_27B = {"gemma2": 46, "gemma3": 62}  # layers of the model whose attention is scaled by hidden size over heads


def _tensors(names: dict[str, str], head_norms: bool) -> Callable[[Config, frozenset[str]], Iterable[Planned]]:
    def tensors(config: Config, present: frozenset[str]) -> Iterator[Planned]:
        yield from layers.ends(config, present, shift=1.0)
        kind = layers.Attention(norms=head_norms, shift=1.0)
        for layer in range(config["num_hidden_layers"]):
            yield from layers.attention(config, layer, kind)
            yield from layers.norms(config, layer, names, shift=1.0)
            yield from layers.gated(config, layer, width=config["intermediate_size"])

    return tensors


def _numbers(writer: gguf.GGUFWriter, config: Config) -> None:
    numbers.sizes(writer, config)
    numbers.heads(writer, config)


def _numbers2(writer: gguf.GGUFWriter, config: Config) -> None:
    _numbers(writer, config)
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    _window(writer, config, "gemma2")


def _numbers3(writer: gguf.GGUFWriter, config: Config) -> None:
    _numbers(writer, config)
    numbers.rotation(writer, config)
    if (base := numbers.sliding_rope_theta(config)) is not None:
        writer.add_rope_freq_base_swa(base)
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    _window(writer, config, "gemma3")


def _window(writer: gguf.GGUFWriter, config: Config, name: str) -> None:
    writer.add_sliding_window(config["sliding_window"])
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    if slides != [(layer + 1) % _EVERY[name] != 0 for layer in range(len(slides))]:
        writer.add_sliding_window_pattern(slides)


def _refuses(config: Config) -> Iterator[str]:
    yield from refusals.setting(config, "attention_bias", False)
    yield from refusals.setting(config, "use_bidirectional_attention", False)
    yield from refusals.setting(config, "hidden_activation", "gelu_pytorch_tanh")


def _refuses1(config: Config) -> Iterator[str]:
    yield from _refuses(config)
    if numbers.rope(config)["rope_type"] != "default" or numbers.rope(config)["rope_theta"] != 10000.0:
        yield f"rope_parameters {dict(numbers.rope(config))}; llama.cpp's converter says none for gemma"


def _refuses_scale(config: Config) -> Iterator[str]:
    name = "gemma2" if config["model_type"] == "gemma2" else "gemma3"
    scaled = config["hidden_size"] // config["num_attention_heads"]
    yield from refusals.setting(
        config,
        "query_pre_attn_scalar",
        scaled if config["num_hidden_layers"] == _27B[name] else config["head_dim"],
    )


def _refuses_full(config: Config) -> Iterator[str]:
    if "sliding_attention" not in config["layer_types"] or not config["sliding_window"]:
        yield (
            f"attention that slides nowhere (sliding_window {config['sliding_window']}, layer_types "
            f"{sorted(set(config['layer_types']))}); llama.cpp ends itself where no layer of this family does"
        )


def _refuses2(config: Config) -> Iterator[str]:
    yield from _refuses1(config)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not config[name]:
            yield f"{name} {config[name]}; llama.cpp always caps the logits of a gemma2"
    yield from _refuses_scale(config)
    yield from _refuses_full(config)


def _refuses3(config: Config) -> Iterator[str]:
    yield from _refuses(config)
    yield from _refuses_scale(config)
    yield from _refuses_full(config)
    yield from refusals.rope_type(config)
    yield from refusals.setting(config, "attn_logit_softcapping")


GEMMA = Architecture("gemma", ("GemmaForCausalLM",), _tensors(_TWO_NORMS, False), _numbers, _refuses1, own_head=False)
GEMMA2 = Architecture(
    "gemma2", ("Gemma2ForCausalLM",), _tensors(_FOUR_NORMS, False), _numbers2, _refuses2, own_head=False
)
GEMMA3 = Architecture(
    "gemma3",
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    _tensors(_FOUR_NORMS, True),
    _numbers3,
    _refuses3,
)
