"""The tokenizer in a GGUF file: the keys of llama.cpp's converter, and in llama.cpp itself the ids of transformers.

The converter's keys are recorded (record_vocabulary.py); where ours are others, `OTHERS` says why.
"""

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from sentencepiece import SentencePieceProcessor

from lite.data.template import encode
from lite.errors import ExportError
from lite.gguf import llama
from lite.gguf.probes import PROBES
from lite.gguf.sentence_pieces import SpmTokenizer, read_pieces
from lite.gguf.special_tokens import fitting_name
from lite.gguf.tokenizer import read_tokenizer
from lite.gguf.vocabulary import add_vocabulary, vocabulary_of
from tests.gguf import known_tokenizers, tiny_tokenizers
from tests.gguf.known_tokenizers import BYTE_LEVEL, SENTENCE_PIECES
from tests.gguf.record_vocabulary import FIXTURE, keys
from tests.gguf.tiny_tokenizers import write_sentencepiece_model, write_tiny_llama

CASES = BYTE_LEVEL | SENTENCE_PIECES
RECORDED = json.loads(gzip.decompress(FIXTURE.read_bytes()))

# Says what the tokenizer does where the converter leaves it to each program; but of Phi-3, whose template prints no BOS
# though the tokenizer puts it before plain text, that there is none.
BOS = "tokenizer.ggml.add_bos_token"
STOPS = "tokenizer.ggml.eos_token_ids"  # all stop tokens, which Ollama reads; there is no such key in llama.cpp
EOT = "tokenizer.ggml.eot_token_id"  # a stop token that llama.cpp does not know by its text
EOM = "tokenizer.ggml.eom_token_id"  # another
# Without tokenizer.model the converter gives all tokens one score, with which llama.cpp merges from left to right
# whatever the merges say; writes no padding; and takes a special token that has no role for an ordinary one.
SCORES, TYPES, TOKENS = "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.tokens"
PREFIX = "tokenizer.ggml.add_space_prefix"  # transformers 5 puts a space at the begin only, where a chat has BOS
TEMPLATE = "tokenizer.chat_template"  # to a file without one llama.cpp talks in ChatML; ours has one for plain text
OTHERS = {
    "qwen2": {STOPS},
    "llama3": {STOPS},
    "gpt2": {BOS, STOPS, EOT, EOM, TEMPLATE},
    "smollm": {BOS},
    "tekken": set(),
    "gpt4o": {BOS, STOPS, TEMPLATE},
    "cl100k": {BOS},
    "llama2": set(),
    "llama2_saved": {SCORES, TYPES, TOKENS, TEMPLATE},
    "mistral3": {SCORES, TYPES, PREFIX},
    "gemma": {STOPS},
    "phi3": {BOS, STOPS, EOT},
}


def stops_of(folder: Path) -> list[int]:
    """Ids of a folder's stop tokens, which each here names in a list."""
    return json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]


def written(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The values of the tokenizer keys that a folder's tokenizer gets."""
    writer = gguf.GGUFWriter(None, "llama")
    add_vocabulary(writer, folder, config, stops=stops_of(folder))
    return json.loads(json.dumps(keys(writer)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """(folder, config) of every tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: (root / name, make(root / name)) for name, make in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_keys_are_the_converters(name: str, folders: dict[str, tuple[Path, dict[str, Any]]]):
    ours, theirs = written(*folders[name]), RECORDED[name]
    assert {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)} == OTHERS[name]


def test_the_keys_that_are_others(folders: dict[str, tuple[Path, dict[str, Any]]]):
    gpt2 = written(*folders["gpt2"])
    stops = stops_of(folders["gpt2"][0])
    assert [gpt2[key][1] for key in (STOPS, EOT, EOM)] == [stops, *stops]
    assert gpt2[BOS] == written(*folders["phi3"])[BOS] == ["BOOL", False]
    saved, own = written(*folders["llama2_saved"]), RECORDED["llama2_saved"]
    assert saved[TOKENS][1][: len(own[TOKENS][1])] == own[TOKENS][1]
    assert saved[TOKENS][1][-1] == "[PAD1023]"
    assert saved[TYPES][1][-1] == gguf.TokenType.UNUSED
    assert saved[TYPES][1][saved[TOKENS][1].index("<|im_end|>")] == gguf.TokenType.CONTROL
    assert saved[TYPES][1][saved[TOKENS][1].index("<note>")] == gguf.TokenType.USER_DEFINED


@pytest.fixture(scope="module", params=CASES)
def served(
    request: pytest.FixtureRequest,
    folders: dict[str, tuple[Path, dict[str, Any]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Path, dict[str, Any], llama.Llama]]:
    """(name, folder, config, llama.cpp) of a model of one layer with each of the tokenizers."""
    folder, config = folders[request.param]
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"

    def vocabulary(writer: gguf.GGUFWriter) -> None:
        writer.add_name(fitting_name("tiny phi3 of mine", folder))
        add_vocabulary(writer, folder, config, stops=stops_of(folder))

    write_tiny_llama(path, vocabulary, config["vocab_size"])
    with llama.running(path) as file:
        yield request.param, folder, config, file


def test_llama_cpp_tokenises_as_transformers_does(served: tuple[str, Path, dict[str, Any], llama.Llama]):
    """Every string but those known to come out otherwise, and of these it is counted that there are few."""
    name, folder, config, file = served
    tokenizer = read_tokenizer(folder)
    probes = vocabulary_of(tokenizer, config["vocab_size"], model_type=config["model_type"]).probes
    # Byte-level ones put nothing before a text, so all are asked at once, an end between each two.
    asked = [tokenizer.tokenizer.eos_token.join(probes)] if name in BYTE_LEVEL else probes
    expected = [tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked]
    assert [file.tokenise(text) for text in asked] == expected
    # mistral3 begins a text otherwise, so its strings all begin with its BOS.
    bare = {probe.removeprefix("<s>") for probe in probes}
    left_out = {"tekken": 25, "gpt4o": 26, "llama2": 23, "llama2_saved": 23}.get(name, 2)
    assert len(set(PROBES) - bare) <= left_out


def test_a_chat_becomes_the_prompt_that_was_trained(served: tuple[str, Path, dict[str, Any], llama.Llama]):
    """With BOS where the template prints it and only there, whatever the tokenizer puts before plain text."""
    _, folder, _, file = served
    tokenizer, turns = read_tokenizer(folder).tokenizer, [{"role": "user", "content": "a"}]
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert file.tokenise(file.rendered(turns), beginning=True) == encode(tokenizer, [text])[0]


def test_llama_cpp_stops_at_every_stop_token(served: tuple[str, Path, dict[str, Any], llama.Llama]):
    """Each is forced as the next token; an ordinary token forced so does not stop."""
    _, folder, _, file = served
    stops = stops_of(folder)
    ordinary = read_tokenizer(folder).tokenizer("a", add_special_tokens=False)["input_ids"][-1]

    def ended(token: int) -> bool:
        asked = {"prompt": [ordinary], "n_predict": 2, "temperature": 0.0, "logit_bias": [[token, 1000.0]]}
        return file._asked("/completion", asked)["stop_type"] == "eos"

    assert [ended(token) for token in [*stops, ordinary]] == [True] * len(stops) + [False]


@pytest.mark.parametrize("served", ["qwen2"], indirect=True)
def test_bytes_come_back(served: tuple[str, Path, dict[str, Any], llama.Llama]):
    file, text = served[-1], "\n".join(PROBES)
    assert file._asked("/detokenize", {"tokens": file.tokenise(text)})["content"] == text


@pytest.mark.parametrize("served", ["qwen2"], indirect=True)
def test_llama_cpp_does_not_compose(served: tuple[str, Path, dict[str, Any], llama.Llama]):
    """Why all probes are NFC: e and a combining acute are one letter for the tokenizer, and two for llama.cpp."""
    _, folder, _, file = served
    tokenizer = read_tokenizer(folder).tokenizer
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("é")["input_ids"] == file.tokenise("é")
    assert file.tokenise("e\u0301") != file.tokenise("é")


@pytest.mark.parametrize("served", ["llama2_saved"], indirect=True)
def test_merging_by_score_is_merging_by_rank(served: tuple[str, Path, dict[str, Any], llama.Llama]):
    """Letters and spaces thrown together, where many merges compete: our SPM, llama.cpp's and transformers agree."""
    _, folder, config, file = served
    tokenizer = read_tokenizer(folder)
    made = vocabulary_of(tokenizer, config["vocab_size"], model_type="llama")
    own = SpmTokenizer(made.tokens, made.scores, made.types, space_prefix=True)
    draw = random.Random(0)
    for _ in range(200):
        text = "a" + "".join(draw.choices("  aaeehhiinnorsttd.33-=\n", k=draw.randrange(1, 60)))
        expected = tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert own.ids(text) == file.tokenise(text) == expected, text


def test_scores_by_hand():
    """merges a b, b c, ab c: "abc" is ab c by the first, then abc by the third; "bc" is made by the second, rank 1."""
    tokens = ["a", "b", "c", "ab", "bc", "abc", "<0x64>"]
    own = SpmTokenizer(tokens, [0.0, 0.0, 0.0, 0.0, -1.0, -2.0, 0.0], [1] * 6 + [6], space_prefix=False)
    assert [own.ids(text) for text in ("abc", "bc", "bcab", "d")] == [[5], [4], [4, 3], [6]]


def test_what_merging_by_score_cannot_do(tmp_path: Path):
    """A token that no merge makes: llama.cpp makes it of any two that spell it. And lower case."""
    settings = known_tokenizers.LLAMA2 | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config = tiny_tokenizers.sentence_pieces(tmp_path, settings=settings, normalizer=known_tokenizers.PREPEND)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    written(tmp_path, config)

    model = document["model"]
    merges = [pair for pair in model["merges"] if "3" not in "".join(pair)]
    path.write_text(json.dumps(document | {"model": model | {"merges": merges}}))
    with pytest.raises(ExportError, match=r"\d+ of \d+ strings become other tokens, '3' for one"):
        written(tmp_path, config)

    lower = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *known_tokenizers.PREPEND["normalizers"]]}
    path.write_text(json.dumps(document | {"normalizer": lower}))
    with pytest.raises(ExportError, match="knows no normalizer but the one"):
        written(tmp_path, config)


def test_tokenizer_model_is_read_as_sentencepiece_reads_it(folders: dict[str, tuple[Path, dict[str, Any]]]):
    path = folders["gemma"][0] / "tokenizer.model"
    pieces, kind = read_pieces(path)
    theirs = SentencePieceProcessor(model_file=str(path))
    assert kind == 2
    assert [(text, score) for text, score, _ in pieces] == [
        (theirs.IdToPiece(i), theirs.GetScore(i)) for i in range(theirs.GetPieceSize())
    ]
    assert [kind == 6 for _, _, kind in pieces] == [theirs.IsByte(i) for i in range(theirs.GetPieceSize())]


def test_a_tokenizer_model_that_is_not_the_tokenizers(tmp_path: Path):
    config = known_tokenizers.llama2(tmp_path)
    path = tmp_path / "tokenizer.model"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExportError, match=r"not a model of SentencePiece .*cut short|not the tokenizer that"):
        written(tmp_path, config)
    pieces, _ = read_pieces_of(whole, tmp_path)
    write_sentencepiece_model(path, [*pieces[:-1], ("other", -1.0, 1)])
    with pytest.raises(ExportError, match="'other' here"):
        written(tmp_path, config)
    write_sentencepiece_model(path, pieces, kind=1)
    with pytest.raises(ExportError, match="of kind 1, where BPE"):
        written(tmp_path, config)


def read_pieces_of(content: bytes, folder: Path) -> tuple[list[tuple[str, float, int]], int]:
    (folder / "whole.model").write_bytes(content)
    return read_pieces(folder / "whole.model")


def test_what_cannot_be_written(tmp_path: Path):
    with pytest.raises(ExportError, match=r"there is no tokenizer\.json"):
        read_tokenizer(tmp_path)
    config = known_tokenizers.gpt2(tmp_path)
    with pytest.raises(ExportError, match="3 tokens have no row in the embedding, which has 437"):
        written(tmp_path, config | {"vocab_size": 437})
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document | {"model": unigram, "added_tokens": []}))
    with pytest.raises(ExportError, match="of the kind Unigram"):
        written(tmp_path, config)


def test_stop_tokens_that_cannot_be_said(tmp_path: Path):
    """EOS is taken; EOT, EOM and FIM_PAD take three more; the fifth has no place. Known texts need none."""
    more = [f"<STOP_{i}>" for i in range(4)]

    def made(stops: list[str]) -> dict[str, Any]:
        config = tiny_tokenizers.byte_level(
            tmp_path,
            known_tokenizers.way("gpt-2"),
            special=["<|endoftext|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", *more],
            settings={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"},
            stops=stops,
        )
        return written(tmp_path, config)

    assert "tokenizer.ggml.fim_pad_token_id" in made(["<|im_end|>", *more[:3]])
    with pytest.raises(ExportError, match=r"would not stop at \['<STOP_3>'\]"):
        made(["<|im_end|>", *more])
    with pytest.raises(ExportError, match=r"would not stop at \['<\|end\|>'\]"):
        made(["<|end|>"])


def test_names_that_llama_cpp_takes_for_phi3(folders: dict[str, tuple[Path, dict[str, Any]]]):
    """It sets the space behind special tokens by the model's name, and aborts where Phi-3's tokens are not there."""
    qwen2, phi3 = folders["qwen2"][0], folders["phi3"][0]
    assert [fitting_name(name, qwen2) for name in ("Mine", "my phi3", "Phi-3 mini")] == [
        "Mine",
        "my phi 3",
        "Phi 3 mini",
    ]
    assert [fitting_name(name, phi3) for name in ("Mine", "my phi3")] == ["Mine (Phi-3)", "my phi3"]
