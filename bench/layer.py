"""One decoder layer with LoRA, forward and backward: lite's fused pieces beside transformers, peft and bitsandbytes.

    OMP_NUM_THREADS=1 python bench/layer.py --out bench/results/layer-cpu-fp32.json
    python bench/layer.py --shape --out bench/results/layer-14b-meta.json

Both run lite's attention, so that the difference is the linear layers, the MLP and the norms. Contenders run in turn;
seconds are medians over rounds, bytes are what is alive after the forward beside the weights, and at the highest.
NF4 computes in what this CPU multiplies fast, as `dtype: auto` does. `--shape` counts what a
layer of 14B keeps by operator, on meta tensors as if on a card, where bf16 heads take the variable-length kernel; and
how many operators it starts, views not among them, with the matrices cast once.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bitsandbytes as bnb
import torch
from measuring import Found, command, counted, machine, median, save, watched
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from lite.attention.branch_attention import install
from lite.attention.branches import BranchTable
from lite.data.packs import Branch
from lite.device import meta_stands_for
from lite.memory.checkpoint import checkpoint_layers
from lite.memory.meter import Meter, frozen_tensors
from lite.memory.tiles import tile_mlps
from lite.model import int8, load, lora, nf4
from lite.model.layers import decoder_layers
from lite.model.mlp import replace_mlps
from lite.model.norms import replace_norms
from lite.model.rotate import replace_rotary
from lite.model.siblings import replace_projections
from lite.plan.cards import CARDS
from lite.plan.cost import Cost
from lite.plan.dry_run import Account

RANK, TILES = 16, 4
SHAPES = {
    "512": (512, 1408, 8, 4),
    "1024": (1024, 2816, 16, 4),
    "14b": (5120, 13824, 40, 8),
}  # hidden, inner, heads, key heads
bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())  # else lost on meta


def layer_of(shape: str, storage: str, contender: str, tile: int, device: str = "cpu") -> tuple[nn.Module, nn.Module]:
    """A model of one layer, and the layer: `peft`, `lite`, with `tiled` or `recomputed` in its name as it says."""
    hidden, inner, heads, key_heads = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=64, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=key_heads, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    bf16 = storage == "bf16" or (storage == "nf4" and (device == "meta" or load.cpu_multiplies_bf16()))
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
        for name, linear in [(n, m) for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)]:
            if storage == "nf4":
                model.model.layers.set_submodule(name, _four_bit(linear))
        if "lite" in contender:
            replace_norms(model)
            nf4.replace_forward(model)
            int8.replace_forward(model)
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    if "lite" in contender:
        lora.replace_forward(model)
        replace_projections(model)
        replace_mlps(model)
        replace_rotary(model)
    if "tiled" in contender:
        tile_mlps(model, tile)
    if "recomputed" in contender:
        checkpoint_layers(model)
    install(model)
    return model.train(), next(iter(decoder_layers(model).values()))


def _four_bit(linear: nn.Linear) -> bnb.nn.Linear4bit:
    data, state = bnb.functional.quantize_4bit(linear.weight.data, quant_type="nf4", compress_statistics=True)
    new = bnb.nn.Linear4bit(1, 1, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4", device="meta")
    new.weight = bnb.nn.Params4bit(
        data, requires_grad=False, quant_state=state, bnb_quantized=True, quant_type="nf4", module=new
    )
    new.in_features, new.out_features = linear.in_features, linear.out_features
    new.quant_state, new.bias = state, linear.bias
    new.support_avx512bf16_for_cpu = False
    return new


def forward_of(model: nn.Module, layer: nn.Module, tokens: int) -> tuple[Tensor, Callable[[], Tensor]]:
    """The layer's input, which wants a gradient, and its forward on one sequence."""
    decoder = model.get_base_model().model
    device, dtype = decoder.norm.weight.device, decoder.norm.weight.dtype
    x = torch.randn(1, tokens, decoder.config.hidden_size, device=device, dtype=dtype).requires_grad_()
    table = BranchTable.of([Branch(0, tokens, -1)], "auto", device)
    rotary = decoder.rotary_emb(x, torch.arange(tokens, device=device)[None])
    table.runs()
    return x, lambda: layer(x, position_embeddings=rotary, branch_table=table)


def kept(model: nn.Module, layer: nn.Module, tokens: int, meter: Meter) -> tuple[int, int]:
    """(bytes after the forward, highest of forward and backward), of what the layer made; its input is not in it."""
    x, forward = forward_of(model, layer, tokens)
    with meter:
        meter.hold([*frozen_tensors(model), *model.parameters(), x], "before")
        meter.hold([p.grad for p in model.parameters() if p.grad is not None], "before")
        before = meter.live["device"]
        meter.begin()
        meter.phase("forward")
        result = forward()
        after, meter.at_forward = meter.live["device"], meter.parts.copy()
        meter.phase("idle")
        slope = torch.ones_like(result)
        meter.phase("backward")
        result.backward(slope)
    return after - before, meter.top["device"] - before


class _ByOperator(Meter):
    """Calls what is alive by the operator that made it."""

    def _part(self, name: str, tensor: Tensor) -> str:
        return name.removeprefix("aten::")


def timed(shape: str, storage: str, contenders: list[str], tokens: int, rounds: int) -> dict[str, Found]:
    """Seconds of forward and backward of each contender, in turn, and its bytes a token."""
    made = {name: layer_of(shape, storage, name, tokens // TILES) for name in contenders}
    steps, found = {}, {name: [] for name in contenders}
    for name, (model, layer) in made.items():
        _, forward = forward_of(model, layer, tokens)

        def step(forward: Callable[[], Tensor] = forward) -> None:
            with lora.cast_once():
                result = forward()
                result.backward(torch.ones_like(result))

        step()  # allocates and warms up
        steps[name] = step
    for number in range(rounds):
        # There and back, for a step is slower after one that has just given its memory back.
        for name, step in list(steps.items())[:: 1 if number % 2 else -1]:
            with watched() as others:
                start, cpu = time.perf_counter(), time.process_time()
                step()
                seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
            found[name].append({"seconds": seconds, "cpu_seconds": cpu_seconds, **others})
    results = {}
    for name, (model, layer) in made.items():
        after, top = kept(model, layer, tokens, Meter())
        results[name] = {
            "seconds": median(found[name], "seconds"), "cpu_seconds": median(found[name], "cpu_seconds"),
            "kept_bytes_a_token": after / tokens, "top_bytes_a_token": top / tokens,
            "rounds": found[name], "counted": len(counted(found[name])),
        }  # fmt: skip
    return results


def by_operator(contender: str, tokens: int = 16384) -> Found:
    """What a layer of Qwen2.5-14B's shape in NF4 keeps on a card after its forward, KiB a token, by operator."""
    model, layer = layer_of("14b", "nf4", contender, tokens // TILES, "meta")
    meter = _ByOperator(granule=512)
    with meta_stands_for("cuda"):
        after, top = kept(model, layer, tokens, meter)
    parts = {name: round(size / tokens / 1024, 2) for name, size in meter.at_forward.most_common() if name != "before"}
    shown = {name: size for name, size in parts.items() if size > 0}
    starts = Account(Cost(CARDS["rtx-4090"], pairs=0))
    with meta_stands_for("cuda"), lora.cast_once():
        kept(model, layer, tokens, starts)
    return {
        "starts": dict(starts.cost.started),
        "kept_kib": round(after / tokens / 1024, 2),
        "top_kib": round(top / tokens / 1024, 2),
        "operators": shown,
    }


def main() -> None:
    """Parse, measure, print a table, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="store_true", help="count for 14B instead of timing")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the sequence (512)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds (7)")
    parser.add_argument("--widths", nargs="+", default=["512", "1024"], choices=list(SHAPES), help="hidden sizes")
    parser.add_argument("--storages", nargs="+", default=["fp32", "nf4"], choices=["fp32", "bf16", "nf4"])
    parser.add_argument("--out", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    contenders = ["peft", "lite", "lite tiled", "peft recomputed", "lite recomputed", "lite tiled recomputed"]
    result: Found = {"command": command(), "machine": machine(), "rank": RANK, "tiles": TILES}
    if arguments.shape:
        result["qwen2.5-14b nf4"] = {name: by_operator(name) for name in contenders}
        print(json.dumps(result["qwen2.5-14b nf4"], indent=1))
    else:
        result["tokens"] = arguments.tokens
        measure = partial(timed, contenders=contenders, tokens=arguments.tokens, rounds=arguments.rounds)
        result["layers"] = {f"{s} {w}": measure(w, s) for s in arguments.storages for w in arguments.widths}
        print(f"{'layer':12s} {'contender':24s} {'s':>8s} {'cpu s':>8s} {'kept KiB/token':>15s} {'highest':>9s}")
        for label, found in result["layers"].items():
            for name, one in found.items():
                sizes = (one["kept_bytes_a_token"] / 1024, one["top_bytes_a_token"] / 1024)
                times = f"{one['seconds']:8.3f} {one['cpu_seconds']:8.3f}"
                print(f"{label:12s} {name:24s} {times} {sizes[0]:15.1f} {sizes[1]:9.1f}")
    save(result, arguments.out)


if __name__ == "__main__":
    main()
