"""`merge`: the folder that is left is the model that was trained, whole, or there is none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import lite
from lite.errors import ExportError
from lite.merge.merge import merge
from lite.merge.source import source_of
from lite.model import trained_with
from lite.recipe import Recipe
from lite.train.progress import Quiet
from tests.merge.test_source import change
from tests.tiny import tiny_settings

IDS = torch.arange(40, 100)[None]  # (1, 60)


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """Of some bytes, by transformers and peft alone, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model(IDS).logits


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_merged_run_is_the_trained_model(trained: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    """By logits; with all its companions, and nothing of the way there is left."""
    run, to = trained(), tmp_path / "merged"
    done = merge(run, to)
    assert torch.allclose(logits(to), logits(tiny / "model", run / "adapter"), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(to), logits(tiny / "model"), atol=1e-3, rtol=0)
    assert hidden(tmp_path) == []
    tensors = load_file(to / "model.safetensors")
    assert (done["tensors"], done["bytes"]) == (len(tensors), sum(tensor.nbytes for tensor in tensors.values()))
    assert (done["dtypes"], done["onto"], done["compared"]) == (["float32"], None, [])

    tokenizer = AutoTokenizer.from_pretrained(str(to))
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(str(tiny / "model")).chat_template
    assert GenerationConfig.from_pretrained(str(to)).eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert trained_with.read(to) == trained_with.read(run / "adapter") == trained_with.record_of(to)
    assert done["trained_with"] == trained_with.read(to)._asdict()
    assert json.loads((to / "config.json").read_text()) == json.loads((tiny / "model" / "config.json").read_text())


def test_the_card_has_recipe_and_figures_and_no_path(trained: Callable[..., Path], tmp_path: Path) -> None:
    run = trained()
    merge(run, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert card.startswith("---\nlibrary_name: transformers\n")
    figures = [result[when]["eval_rewards/margins"] for when in ("eval_before", "eval_after")]
    assert f"| margin: reward of chosen − rejected | {figures[0]:.4f} | {figures[1]:.4f} |" in card
    for line in ("lora_r: 4", "learning_rate: 0.01", "data: pairs.jsonl", "model: model", "lite merge run -o merged"):
        assert f"\n{line}\n" in card
    assert str(tmp_path.parent) not in card
    assert trained_with.read(run / "adapter").tokenizer in card


def test_a_run_that_went_on_from_another(trained: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    """Its adapter holds what both have learned."""
    settings = tiny_settings(tiny, max_steps=1, samples=0, run=str(trained()), output_dir=str(tmp_path / "second"))
    second = lite.train(Recipe(**settings)).folder
    merge(second, tmp_path / "merged")
    assert torch.allclose(logits(tmp_path / "merged"), logits(tiny / "model", second / "adapter"), atol=1e-5, rtol=0)


def test_merged_once_more_it_stays_the_same(trained: Callable[..., Path], tmp_path: Path) -> None:
    merge(trained(), tmp_path / "once")
    merge(tmp_path / "once", tmp_path / "twice")
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json", "trained_with.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_the_dtype_of_the_base_is_kept(trained: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    """Added in fp32 and rounded to bf16 once: (bf16 base + delta) to the nearest."""
    model = AutoModelForCausalLM.from_pretrained(str(tiny / "model"), dtype=torch.bfloat16)
    model.save_pretrained(str(tmp_path / "base"))
    adapter = shutil.copytree(trained() / "adapter", tmp_path / "adapter")
    with pytest.raises(ExportError, match="has other weights than it was trained on"):
        merge(adapter, tmp_path / "merged", base=tmp_path / "base")
    change(adapter / trained_with.RECORD, base=None)  # as the error says
    done = merge(adapter, tmp_path / "merged", base=tmp_path / "base")
    assert done["dtypes"] == ["bfloat16"]
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    found = load_file(tmp_path / "merged" / "model.safetensors")
    exact = PeftModel.from_pretrained(model.float(), str(adapter)).merge_and_unload().state_dict()
    for name, tensor in found.items():
        assert torch.allclose(tensor.float(), exact[name], rtol=2**-8, atol=1e-8)


def test_a_tied_model_is_untied_where_its_head_was_trained(tiny: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(str(tiny / "model"))
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(str(tmp_path / "base"))
    shutil.copytree(
        tiny / "model", tmp_path / "base", dirs_exist_ok=True, ignore=shutil.ignore_patterns("model*", "c*")
    )
    settings = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(str(tmp_path / "base")), settings)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    with torch.no_grad():
        expected = adapted(IDS).logits
    merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.allclose(logits(tmp_path / "merged"), expected, atol=1e-5, rtol=0)


def test_a_folder_that_is_taken(trained: Callable[..., Path], tmp_path: Path) -> None:
    """A link to an empty folder is none: what it leads to becomes the model."""
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"a file is there\. Expected a folder, or nothing"):
        merge(trained(), tmp_path / "file")
    with pytest.raises(ExportError, match="something is in it already"):
        merge(trained(), tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there", target_is_directory=True)
    merge(trained(), tmp_path / "link")
    assert (tmp_path / "there" / "model.safetensors").is_file()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("end", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_stops_it_leaves_nothing(trained: Callable[..., Path], tmp_path: Path, end: BaseException) -> None:
    """After a part was written."""

    class Stops(Quiet):
        def rows(self, done: int, total: int, unit: str = "rows") -> None:
            (unfinished,) = tmp_path.glob(".merged.unfinished-*")
            assert (unfinished / "model.safetensors").stat().st_size > 1000
            raise end

    with pytest.raises(ExportError if isinstance(end, OSError) else KeyboardInterrupt):
        merge(trained(), tmp_path / "merged", progress=Stops())
    assert list(tmp_path.iterdir()) == []


def test_two_at_once(trained: Callable[..., Path], tmp_path: Path) -> None:
    """Each writes a folder of its own: the first to end gets the name, and the other leaves it as it is."""
    to = tmp_path / "merged"

    class Overtaken(Quiet):
        def rows(self, done: int, total: int, unit: str = "rows") -> None:
            if not to.exists():
                merge(trained(), to)

    with pytest.raises(ExportError, match=r"merged: something has appeared there while this was written.*It stays"):
        merge(trained(), to, progress=Overtaken())
    assert list(tmp_path.iterdir()) == [to]
    merge(trained(), tmp_path / "alone")
    assert {path.name for path in to.iterdir()} == {path.name for path in (tmp_path / "alone").iterdir()}
    assert (to / "model.safetensors").read_bytes() == (tmp_path / "alone" / "model.safetensors").read_bytes()


def test_a_shard_that_is_cut_is_told_before(run: Path, tiny: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny / "model", tmp_path / "base")
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    (run / "identity.json").write_text(json.dumps({"model": {}}), encoding="utf-8")
    with pytest.raises(ExportError, match=r"model\.safetensors"):
        merge(run, tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()


def test_a_checkpoint_in_four_bits_is_merged_as_plain_weights(tiny: Path, tmp_path: Path) -> None:
    """The config says no more that it is quantised, and transformers loads what the source reads."""
    from transformers import BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        str(tiny / "model"), quantization_config=four_bit, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(str(tmp_path / "base"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny / "model" / name, tmp_path / "base" / name)
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, settings)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    assert source_of(tmp_path / "adapter", base=tmp_path / "base").onto == "quantised"
    merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with torch.no_grad():
        assert torch.allclose(logits(tmp_path / "merged"), adapted(IDS).logits, atol=1e-4, rtol=0)
