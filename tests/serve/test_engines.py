"""The exact commands of other engines."""

from pathlib import Path

from lite.merge.source import source_of
from lite.model.catalog import BUNDLED_MODEL
from lite.serve.engines import ways
from lite.serve.serve import Door
from tests import served


def test_a_whole_model_is_served_as_it_is() -> None:
    source = source_of(BUNDLED_MODEL)
    (way,) = ways("vllm", source, Door(port=9000), 2048, name="mine")
    assert way.merged is None
    assert " ".join(way.command) == (
        f"vllm serve {source.folder} --served-model-name mine --host 127.0.0.1 --port 9000 --max-model-len 2048"
    )
    (way,) = ways("sglang", source, Door(api_key="sesame"), None, name="mine")
    assert " ".join(way.command) == (
        f"python -m sglang.launch_server --model-path {source.folder} --served-model-name mine --host 127.0.0.1 "
        "--port 8080 --api-key sesame"
    )


def test_an_adapter_is_merged_or_put_on_its_base() -> None:
    source = source_of(served.adapter())
    merged, beside = ways("vllm", source, Door(), None, name="tuned")
    assert merged.merged is not None
    assert merged.merged.parent == served.adapter() / "serve"
    assert merged.command[2] == str(merged.merged)
    assert beside.merged is None
    assert " ".join(beside.command) == (
        f"vllm serve {BUNDLED_MODEL} --enable-lora --max-lora-rank 8 --lora-modules tuned={served.adapter()} "
        f"--tokenizer {source.files} --host 127.0.0.1 --port 8080"
    )
    assert len(ways("sglang", source, Door(), None, name="tuned")) == 1


def test_a_folder_that_is_merged_already_is_not_merged_again() -> None:
    source = source_of(served.adapter())
    made = ways("vllm", source, Door(), None, name="tuned")[0].merged
    assert isinstance(made, Path)
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    try:
        assert ways("vllm", source, Door(), None, name="tuned")[0].merged is None
    finally:
        (made / "config.json").unlink()
        made.rmdir()
