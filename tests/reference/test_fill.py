"""Filling: exact, each row once, and the same bytes however often it was killed."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lite.attention.branch_attention import install, plain_attention
from lite.data.packs import Layout
from lite.engine import score
from lite.engine.forward import Path as ForwardPath
from lite.reference.fill import fill, keys_of, missing
from lite.reference.lookup import Cached
from lite.reference.store import Store
from lite.reference.weights import Identity

PAIRS = Layout(("chosen", "rejected"), tokens_per_pack=120)
IDENTITY = Identity("0" * 32, "none", "float32")


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(tmp_path) as opened:
        yield opened


def test_what_is_read_back_is_what_the_engine_says(tiny_model, token_examples, store: Store) -> None:
    """fp32 log-probs to 1e-5 whatever packs they came from; a second fill, in another order too, computes nothing."""
    model, examples = tiny_model("qwen3"), token_examples()
    install(model)
    assert fill(store, IDENTITY, examples, model, PAIRS, ForwardPath()) == len(examples)
    assert fill(store, IDENTITY, examples[::-1], model, PAIRS, ForwardPath()) == 0
    reference = Cached(store, IDENTITY)
    truth = score.logps(model, examples, Layout(PAIRS.completions, tokens_per_pack=100_000), ForwardPath())
    for c, name in enumerate(PAIRS.completions):
        for i, expected in enumerate(truth[name].tokens.split(truth[name].length.tolist())):
            torch.testing.assert_close(reference.logps(examples[i], c), expected, atol=1e-5, rtol=0)


def test_new_rows_cost_themselves(tiny_model, token_examples, store: Store) -> None:
    model, old, new = tiny_model("qwen3"), token_examples(), token_examples(seed=2)
    install(model)
    fill(store, IDENTITY, old, model, PAIRS, ForwardPath())
    assert missing(store, IDENTITY, [*old, *new], top_k=None) == new
    assert fill(store, IDENTITY, [*new, *old], model, PAIRS, ForwardPath()) == len(new)


def test_the_same_row_twice_is_computed_once(tiny_model, token_examples, store: Store) -> None:
    model, examples = tiny_model("qwen3"), token_examples()
    install(model)
    assert fill(store, IDENTITY, [*examples, *examples], model, PAIRS, ForwardPath()) == len(examples)


def test_likeliest_words_and_log_probs_from_one_pass(tiny_model, token_examples, store: Store) -> None:
    """The words are those of a plain log-softmax; wanting fewer later computes nothing, wanting more does."""
    model, pairs = tiny_model("qwen3"), token_examples()
    install(model)
    layout = Layout(("completion",), tokens_per_pack=120)
    examples = [type(e)(e.prompt, e.completions[:1], e.place) for e in pairs]
    assert fill(store, IDENTITY, examples, model, layout, ForwardPath(13), top_k=8) == len(examples)
    assert fill(store, IDENTITY, examples, model, layout, ForwardPath(13), top_k=3) == 0
    assert fill(store, IDENTITY, examples, model, layout, ForwardPath(13), top_k=9) == len(examples)
    reference = Cached(store, IDENTITY, 9)
    for example in examples:
        ids = torch.tensor([example.prompt + example.completions[0]])
        with torch.no_grad(), plain_attention(model):
            logits = model(ids).logits[0, len(example.prompt) - 1 : -1]
        top, words = reference.top(example, 0)
        truth = torch.log_softmax(logits, 1)
        torch.testing.assert_close(top, truth.topk(9).values, atol=1e-5, rtol=0)
        torch.testing.assert_close(truth.gather(1, words), top, atol=1e-5, rtol=0)


def test_a_broken_row_is_found_before_training(tiny_model, token_examples, store: Store) -> None:
    """A flipped bit in one row: that row is missing, and computed again."""
    model, examples = tiny_model("qwen3"), token_examples()
    install(model)
    fill(store, IDENTITY, examples, model, PAIRS, ForwardPath())
    key = keys_of(examples[2])[1]
    with sqlite3.connect(store.path) as connection:
        (blob,) = connection.execute("SELECT tokens FROM logps WHERE key = ?", [key]).fetchone()
        connection.execute("UPDATE logps SET tokens = ? WHERE key = ?", [bytes([blob[0] ^ 1]) + blob[1:], key])
    connection.close()
    assert missing(store, IDENTITY, examples, top_k=None) == [examples[2]]


def test_broken_words_are_found_before_training(tiny_model, token_examples, store: Store) -> None:
    model = tiny_model("qwen3")
    install(model)
    layout = Layout(("completion",), tokens_per_pack=120)
    examples = [type(e)(e.prompt, e.completions[:1], e.place) for e in token_examples()]
    fill(store, IDENTITY, examples, model, layout, ForwardPath(13), top_k=4)
    key = keys_of(examples[1])[0]
    with sqlite3.connect(store.path) as connection:
        (blob,) = connection.execute("SELECT ids FROM tops WHERE key = ?", [key]).fetchone()
        connection.execute("UPDATE tops SET ids = ? WHERE key = ?", [bytes([blob[0] ^ 1]) + blob[1:], key])
    connection.close()
    assert missing(store, IDENTITY, examples, top_k=None) == []
    assert missing(store, IDENTITY, examples, top_k=4) == [examples[1]]


# Fills `sys.argv[1]` from a tiny model over 60 pairs; kills itself after `sys.argv[2]` packs of this process, if given.
FILLING = """
import os, signal, sys
from pathlib import Path
import torch, transformers
from lite.data.examples import Place, TokenExample
from lite.data.packs import Layout
from lite.engine.forward import Path as ForwardPath
from lite.attention.branch_attention import install
from lite.reference import fill as filling
from lite.reference.store import Store
from lite.reference.weights import Identity
from tests.architectures import tiny_config, VOCABULARY
torch.manual_seed(0)
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_config(tiny_config("qwen3")).eval()
install(model)
g = torch.Generator().manual_seed(1)
def ids(n): return tuple(torch.randint(3, VOCABULARY, (n,), generator=g).tolist())
examples = [TokenExample(ids(5 + i % 7), (ids(3 + i % 11), ids(2 + i % 5)), Place("p", i)) for i in range(60)]
filling.COMMIT_EVERY_S = 0.0
packs = 0
def done(count):
    global packs
    packs += 1
    if len(sys.argv) > 2 and packs == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
with Store.open(Path(sys.argv[1])) as store:
    print(filling.fill(store, Identity("0" * 32, "none", "float32"), examples, model,
                       Layout(("chosen", "rejected"), tokens_per_pack=60), ForwardPath(), done=done))
"""


def rows_of(folder: Path) -> list[tuple]:
    connection = sqlite3.connect(folder / "reference.sqlite")
    try:
        return sorted(connection.execute("SELECT key, length, total, tokens, checksum FROM logps").fetchall())
    finally:
        connection.close()


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.nightly)])
def test_killed_again_and_again_it_leaves_the_same_bytes(kills: int, tmp_path: Path) -> None:
    """kill −9 after a random number of packs; then finished: bitwise the rows of an uninterrupted fill.

    Nothing that was committed is computed again: what the last process computes is what was missing.
    """
    root = Path(__file__).parents[2]

    def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", FILLING, str(folder), *arguments], capture_output=True, text=True, cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole).stdout.strip() == "60"
    draw = random.Random(3)
    seen = 0
    for _ in range(kills):
        ended = run(killed, str(draw.randint(1, 3)))
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        now = len(rows_of(killed))
        assert now >= seen
        seen = now
    last = run(killed)
    assert int(last.stdout) == 60 - seen // 2
    assert rows_of(killed) == rows_of(whole)
