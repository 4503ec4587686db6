"""Text that any machine with this environment has, as tokens: what bench/optimizers.py trains its small models on.

`python` is the sources of Python's standard library, `c++` the headers that torch brings: two texts unlike enough that
a model of the first has to learn the second. Files are drawn by a fixed seed and cut into those to train on and those
to validate on, file by file. Of each training a BPE tokenizer is made of the first text alone, on the spot. Another
version of Python or torch is another text: `Corpus.digest` says so.
"""

import hashlib
import random
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

TEXTS = ("python", "c++")
HELD_OUT = 8  # of so many files one is validated on
START = "<|file|>"  # what begins a file
LEFT_OUT = {"site-packages", "ops"}  # other people's packages; seven thousand generated headers of a few lines
ONE_FILE = 60_000  # characters of a file at most: no text is a few tables


@dataclass(frozen=True)
class Corpus:
    """A text as tokens."""

    name: str
    train: Tensor  # (tokens,) int64
    validation: Tensor  # (sequences, length) int64
    vocabulary: int
    digest: str  # of both texts and the tokenizer

    def packs(self, seed: int, step: int, shape: tuple[int, int, int]) -> Tensor:
        """A step's tokens, (packs, sequences, length) as `shape` says, of which seed and step alone decide."""
        draw = torch.Generator().manual_seed(1_000_003 * seed + step)
        count, length = shape[0] * shape[1], shape[2]
        starts = torch.randint(len(self.train) - length, (count, 1), generator=draw)
        return self.train[starts + torch.arange(length)].view(shape)


@cache
def read(name: str, *, vocabulary: int, length: int, sequences: int, characters: int) -> Corpus:
    """The text `name` (of TEXTS) in tokens of the first text's tokenizer; `characters` are those of the training text.

    Validated on are the first `sequences` stretches of `length` tokens of the files held out. Raises SystemExit if
    they are too few.
    """
    tokenizer, (train, held_out) = _tokenizer(vocabulary, characters), _files(name, characters)
    ids = [[token for one in tokenizer.encode_batch(texts) for token in one.ids] for texts in (train, held_out)]
    if len(ids[1]) < sequences * length:
        raise SystemExit(f"{name}: {len(ids[1]):,} tokens are held out, and {sequences * length:,} are wanted")
    digest = hashlib.sha256(tokenizer.to_str().encode())
    digest.update("".join(train + held_out).encode())
    validation = torch.tensor(ids[1][: sequences * length]).view(sequences, length)
    return Corpus(name, torch.tensor(ids[0]), validation, vocabulary, digest.hexdigest()[:16])


@cache
def _tokenizer(vocabulary: int, characters: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[START], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_files(TEXTS[0], characters)[0], trainer)
    return tokenizer


@cache
def _files(name: str, characters: int) -> tuple[list[str], list[str]]:
    """Texts to train on, of so many characters in all, and texts held out."""
    folder, pattern = {
        "python": (Path(sysconfig.get_path("stdlib")), "*.py"),
        "c++": (Path(torch.__file__).parent / "include", "*.h"),
    }[name]
    paths = sorted(p for p in folder.rglob(pattern) if not LEFT_OUT & set(p.relative_to(folder).parts))
    random.Random(0).shuffle(paths)
    train, held_out, total = [], [], 0
    for number, path in enumerate(paths):
        text = START + path.read_text(encoding="utf-8", errors="replace")[:ONE_FILE]
        (train if number % HELD_OUT else held_out).append(text)
        total += len(text) if number % HELD_OUT else 0
        if total >= characters:
            break
    return train, held_out
