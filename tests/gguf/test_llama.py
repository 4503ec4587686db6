"""llama.cpp in this process says what transformers says, lets in whom it should, and ends."""

import json
import os
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lite.errors import ExportError
from lite.gguf import llama
from lite.gguf.heard import heard
from lite.gguf.llama import Llama
from lite.gguf.types import FILE_TYPES
from lite.gguf.write import write
from lite.merge.source import source_of
from lite.model.catalog import BUNDLED_MODEL
from tests import served

ENDLESS = {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 100_000, "ignore_eos": True}


@pytest.fixture(scope="module")
def file() -> Iterator[Llama]:
    with llama.running(served.gguf("f32"), parallel=1) as running:
        yield running


def test_says_what_the_model_says(file: Llama) -> None:
    """The whole distribution after each of several prompts, asked together and one by one."""
    ids = [*served.prompt(), *served.tokenizer()("The capital of France is Paris.")["input_ids"]]
    prompts = [ids[:length] for length in (3, 9, 10, len(ids))]
    model = AutoModelForCausalLM.from_pretrained(str(BUNDLED_MODEL), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([one])).logits[0, -1].log_softmax(-1) for one in prompts]
    together = file.next_tokens(prompts, file.facts["n_vocab"])
    for one, found, logps in zip(prompts, together, expected, strict=True):
        assert sorted(found.ids.tolist()) == list(range(2048))
        assert (found.logps[:-1] >= found.logps[1:]).all()
        # Keys and values are kept in fp16.
        torch.testing.assert_close(torch.from_numpy(found.logps), logps[found.ids], atol=0.02, rtol=0)
        (alone,) = file.next_tokens([one], 5)
        assert alone.ids.tolist() == found.ids[:5].tolist()


def test_says_it_where_the_likeliest_is_part_of_a_character(tmp_path: Path) -> None:
    """A model that thinks of the first byte of an emoji most: llama.cpp holds that back until the rest has come."""
    shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    byte = served.tokenizer()("🦙")["input_ids"][0]
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    model = AutoModelForCausalLM.from_pretrained(str(BUNDLED_MODEL), dtype=torch.float32)
    with torch.no_grad():
        likeliest = model(input_ids=torch.tensor([served.prompt()])).logits[0, -1].argmax()
    weights["lm_head.weight"][byte] = 2 * weights["lm_head.weight"][likeliest]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    write(source_of(tmp_path / "model"), {FILE_TYPES["f32"]: tmp_path / "model.gguf"})
    with llama.running(tmp_path / "model.gguf", parallel=1) as running:
        (found,) = running.next_tokens([served.prompt()], 3)
    assert found.ids[0] == byte


def test_tokens_and_prompts_are_the_tokenizers(file: Llama) -> None:
    text = "<|im_start|>user\n你好, wörld 🦙<|im_end|>"
    assert file.tokenise(text) == served.tokenizer()(text)["input_ids"]
    plain = file.tokenise(text, special=False)
    assert served.tokenizer().decode(plain) == text
    assert not set(plain) & set(served.tokenizer().all_special_ids)
    rendered = file.rendered([{"role": "user", "content": served.QUESTION}])
    assert file.tokenise(rendered, beginning=True) == served.prompt()


def test_answers_end_by_the_models_token_or_the_limit(file: Llama) -> None:
    whole, cut = file.greedy([served.prompt()], max_tokens=64)[0], file.greedy([served.prompt()], max_tokens=2)[0]
    assert whole.stopped
    assert whole.ids[-1] == served.tokenizer().eos_token_id
    assert not cut.stopped
    assert cut.ids == whole.ids[:2]
    turns = [{"role": "user", "content": served.QUESTION}]
    pieces = list(file.chat(turns, temperature=0, max_tokens=64))
    assert len(pieces) > 3
    assert "".join(pieces) == served.tokenizer().decode(whole.ids[:-1])


def test_where_an_answer_ends(file: Llama) -> None:
    """At the end of a turn and at that of a text, and at no other token."""
    ends = {served.tokenizer().eos_token_id, served.tokenizer().pad_token_id}
    assert {token for token in range(2030, 2048) if file.ends_at(token)} == ends


def test_what_it_refuses_is_told_in_its_words(file: Llama) -> None:
    with pytest.raises(ExportError, match="answered /completion with: Prompt contains invalid tokens"):
        file.next_tokens([[99_999]], 1)
    with pytest.raises(ExportError, match="exceeds the available context size"):
        list(file.chat([{"role": "user", "content": "hi " * 5000}]))
    assert file.tokenise("a")  # and it goes on


def test_nobody_without_the_key_and_no_page_reads_an_answer(file: Llama) -> None:
    asked = urllib.request.Request(f"{file.address}/v1/models", headers={"Origin": "http://elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked)
    assert refused.value.code == 401
    assert refused.value.headers["Access-Control-Allow-Origin"] == ""


def test_ends_soon_though_requests_are_under_way() -> None:
    """Both a stream that is read no further and a client that waits for its whole answer."""
    refused = []

    def wait(address: str) -> None:
        body = json.dumps(ENDLESS).encode()
        try:
            urllib.request.urlopen(urllib.request.Request(f"{address}/v1/chat/completions", body))
        except OSError as error:
            refused.append(error)

    before = threading.active_count()
    with llama.running(served.gguf(), api_keys=()) as file:
        client = threading.Thread(target=wait, args=(file.address,))
        client.start()
        stream = file.chat(**ENDLESS)
        assert next(stream)
        began = time.monotonic()
    assert time.monotonic() - began < 15
    client.join(timeout=15)
    assert refused
    assert threading.active_count() == before


def test_what_is_said_late_is_heard() -> None:
    """llama.cpp's log comes from a thread of its own, after the call that failed."""
    with heard() as said:
        late = threading.Timer(0.2, os.write, (2, b"0.01.349.281 E why\n"))
        late.start()
    late.join()
    assert said == ["why"]


def test_a_file_that_cannot_be_loaded_and_a_port_that_is_taken(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match=r"gone\.gguf: no such file"),
        llama.running(tmp_path / "gone.gguf"),
    ):
        pass
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(served.gguf().read_bytes()[:300_000])
    with (
        pytest.raises(ExportError, match=r"(?s)cut\.gguf: llama\.cpp cannot load it.*not within the file bounds"),
        llama.running(cut),
    ):
        pass
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ExportError, match=rf"127\.0\.0\.1:{port}\. It says:\n.*couldn't bind"),
            llama.running(served.gguf(), port=port),
        ):
            pass
