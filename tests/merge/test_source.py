"""What a run, an adapter and a model stand for, and what is said where they do not fit together."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lite.bundled import __file__ as bundled
from lite.errors import ExportError, RunError
from lite.merge.source import ORIGINAL, QUANTISED, has_two_bases, source_of
from lite.model import trained_with
from lite.recipe import load


def change(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def rename_base(run: Path, name: str, **identity: object) -> None:
    """Let the run have been trained on another name."""
    recipe = (run / "recipe.yaml").read_text(encoding="utf-8").splitlines()
    recipe = [f"model: {name}" if line.startswith("model:") else line for line in recipe]
    (run / "recipe.yaml").write_text("\n".join(recipe) + "\n", encoding="utf-8")
    change(run / "adapter" / "adapter_config.json", base_model_name_or_path=name)
    change(run / "identity.json", model={"name": name, **identity})


def test_a_run(trained: Callable[..., Path], tiny: Path) -> None:
    """Its recipe and figures, the base that it names, and its own tokenizer; its adapter's folder means the same."""
    run = trained()
    for name in (run, str(run), run / "adapter"):
        source = source_of(name)
        assert (source.name, source.folder, source.base) == ("run", run, (tiny / "model").resolve())
        assert (source.files, source.adapter) == (run / "adapter", run / "adapter")
        assert source.recipe.max_steps == source.result["steps"] == 2
        assert source.config == json.loads((tiny / "model" / "config.json").read_text(encoding="utf-8"))
        assert (source.onto, source.base_name, has_two_bases(source)) == (None, None, False)


def test_a_run_in_few_bits_has_two_bases(trained: Callable[..., Path]) -> None:
    """They differ where a linear layer is, and nowhere else."""
    run = trained(load_in_4bit=True)
    one, other = source_of(run), source_of(run, onto=QUANTISED)
    assert (one.onto, other.onto) == (ORIGINAL, QUANTISED)
    assert has_two_bases(one)
    assert set(other.stored.values()) == {torch.float32}
    differ = {name for name in one.weights.shapes if not torch.equal(one.weights.rows(name), other.weights.rows(name))}
    layers = {name for name in one.weights.shapes if name.endswith("_proj.weight")}
    assert len(layers) == 14
    assert differ == layers


def test_an_adapter_from_elsewhere(trained: Callable[..., Path], tiny: Path, tmp_path: Path) -> None:
    """Without a run around it it lies on the base that it names; without a tokenizer the base's is meant."""
    folder = shutil.copytree(trained() / "adapter", tmp_path / "mine")
    source = source_of(folder)
    assert (source.name, source.recipe, source.base) == ("mine", None, (tiny / "model").resolve())
    assert source.files == folder
    for name in ("tokenizer.json", "tokenizer_config.json", trained_with.RECORD):
        (folder / name).unlink()
    assert source_of(folder).files == (tiny / "model").resolve()
    change(folder / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ExportError, match=r"names no base model. Say where it lies: --base DIR"):
        source_of(folder)
    assert source_of(folder, base=tiny / "model").base == (tiny / "model").resolve()


def test_a_model(tiny: Path) -> None:
    source = source_of(tiny / "model")
    assert (source.name, source.files, source.adapter) == ("model", (tiny / "model").resolve(), None)
    for asked in ({"base": "there"}, {"onto": QUANTISED}):
        with pytest.raises(ExportError, match="it is a whole model, so there is nothing to merge"):
            source_of(tiny / "model", **asked)


@pytest.mark.skipif(not (Path(bundled).parent / "model").is_dir(), reason="the bundled model has not been made")
def test_the_bundled_model() -> None:
    source = source_of("bundled")
    assert source.files == Path(bundled).parent / "model"
    assert "model.embed_tokens.weight" in source.weights.shapes


def test_a_run_that_trained_every_weight(run: Path, tiny: Path) -> None:
    """Its model/ is the result: nothing is merged, and the base need not be there."""
    shutil.copytree(tiny / "model", run / "model")
    rename_base(run, "org/gone")
    load(run / "recipe.yaml").model_copy(update={"full": True, "optimizer": "galore", "lora_r": 16}).save(
        run / "recipe.yaml"
    )
    shutil.rmtree(run / "adapter")
    source = source_of(run)
    assert (source.name, source.files, source.adapter) == ("run", run / "model", None)
    assert source.recipe.max_steps == 2
    assert source.weights.shapes == source_of(tiny / "model").weights.shapes
    with pytest.raises(ExportError, match="the run trained every weight, so there is nothing to merge"):
        source_of(run, onto=QUANTISED)
    shutil.rmtree(run / "model")
    with pytest.raises(RunError, match=f"no longer there, or not whole. `lite resume {run}` writes it again"):
        source_of(run)


def test_an_unfinished_run(run: Path) -> None:
    (run / "result.json").unlink()
    with pytest.raises(RunError, match=f"this run has not finished. Let it: `lite resume {run}`"):
        source_of(run)


def test_a_base_that_moved(run: Path, tiny: Path, tmp_path: Path) -> None:
    sizes = json.loads((run / "identity.json").read_text(encoding="utf-8"))["model"]["files"]
    rename_base(run, str(tmp_path / "gone"), files=sizes)
    with pytest.raises(ExportError, match=r"its base model .*gone is not there\. Say where it lies now: --base DIR"):
        source_of(run)
    assert source_of(run, base=tiny / "model").base == (tiny / "model").resolve()
    with pytest.raises(ExportError, match=r"--base .*nowhere: no model is there"):
        source_of(run, base=tmp_path / "nowhere")


def test_a_base_of_the_hub_that_is_not_here(run: Path) -> None:
    """The very commit is named, for a branch moves."""
    rename_base(run, "qwen-0.5b", commit="0123abcd")
    fetch = "hf download Qwen/Qwen2.5-0.5B-Instruct --revision 0123abcd"
    with pytest.raises(ExportError, match=rf"is not on this machine, or not whole\. Get it by `{fetch}`, or"):
        source_of(run)


def test_another_base(run: Path, tiny: Path, tmp_path: Path) -> None:
    """Its weights have another size than when the run was trained on them."""
    other = shutil.copytree(tiny / "model", tmp_path / "other")
    with (other / "model.safetensors").open("ab") as file:
        file.write(b"more")
    size = (tiny / "model" / "model.safetensors").stat().st_size
    told = rf"trained on another base:\n  .*model\.safetensors: {size + 4:,} bytes, {size:,} when the run was trained"
    with pytest.raises(ExportError, match=told):
        source_of(run, base=other)


def test_what_does_not_fit_the_weights(run: Path) -> None:
    (run / "adapter" / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    change(run / "adapter" / "generation_config.json", eos_token_id=[3])
    with pytest.raises(ExportError) as caught:
        source_of(run)
    assert "chat template (chat_template.jinja)" in str(caught.value)
    assert "stop tokens (eos_token_id in generation_config.json)" in str(caught.value)
    assert "\n  tokenizer (" not in str(caught.value)


def test_nothing_is_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="neither a run, an adapter nor a model is there"):
        source_of(tmp_path)
    with pytest.raises(ExportError, match=r"Expected a folder with recipe.yaml"):
        source_of(tmp_path / "none" / "there")
    with pytest.raises(ExportError, match="runs/mine: there is no such folder, and this model is not on this machine"):
        source_of("runs/mine")
    (run / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(RunError, match=rf"{run}/adapter: the adapter that the run trained is no longer there"):
        source_of(run)


def test_one_base_is_all_there_is(trained: Callable[..., Path]) -> None:
    with pytest.raises(ExportError, match=r"--onto quantised: .* was not trained on a base in 4 or 8 bits"):
        source_of(trained(), onto=QUANTISED)


def test_another_base_of_the_same_shapes(run: Path, tiny: Path, tmp_path: Path) -> None:
    """As a base for its instruct: told, of a run and of an adapter; a record that does not know its base passes."""
    other = shutil.copytree(tiny / "model", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor.flip(0) for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    assert (other / "model.safetensors").stat().st_size == (tiny / "model" / "model.safetensors").stat().st_size
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    for name in (run, adapter):
        assert source_of(name, base=shutil.copytree(tiny / "model", tmp_path / "copy", dirs_exist_ok=True)).adapter
        with pytest.raises(
            ExportError, match=rf"adapter: the adapter belongs to another base: {other} has.*\n.*--base DIR"
        ):
            source_of(name, base=other)
    change(adapter / trained_with.RECORD, base=None)
    assert source_of(adapter, base=other).base == other


def test_a_config_that_is_no_object(run: Path, tiny: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny / "model", tmp_path / "base")
    (base / "config.json").write_text("[1]", encoding="utf-8")
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    for name, where in ((adapter, base), (base, None)):
        with pytest.raises(ExportError, match=r"config\.json: a list\. Expected a JSON object"):
            source_of(name, base=where)
