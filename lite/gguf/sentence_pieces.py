"""SentencePiece's BPE in a GGUF file: a score for each token, by which llama.cpp merges as the tokenizer does.

llama.cpp merges the two neighbours that make the token of the highest score, the leftmost of equal ones. tokenizer.json
has a list of merges instead, and the earliest goes first. The scores come from tokenizer.model where the folder has it,
else minus the rank of the first merge that makes the token. The two are the same as long as each two tokens whose
texts make a third have a merge; so `SpmTokenizer` does as llama.cpp does, and is compared with every tokenizer before
it is written.
"""

import heapq
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from gguf import TokenType

from lite.errors import ExportError, raise_collected
from lite.gguf.tokenizer import TrainedTokenizer

UNREACHED = -10000000.0  # below every rank: no merge makes the token
PADDING = -10000.0
KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")  # whatever the model is called
BPE = 2  # trainer_spec.model_type of sentencepiece_model.proto


def scored_pieces(tokenizer: TrainedTokenizer, rows: int) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types (gguf.TokenType), each by id, the added tokens not yet in their places.

    Raises ExportError for a tokenizer.model that is no BPE, or of another vocabulary than tokenizer.json's.
    """
    tokens = [f"[PAD{i}]" for i in range(rows)]
    scores = [PADDING] * rows
    types = [int(TokenType.UNUSED)] * rows
    path = tokenizer.files / "tokenizer.model"
    pieces = _own_pieces(tokenizer, path) if path.is_file() else _ranked_pieces(tokenizer)
    for i, text, score, kind in pieces:
        if i < rows:
            tokens[i], scores[i], types[i] = text, score, kind
    return tokens, scores, types


def read_pieces(path: Path) -> tuple[list[tuple[str, float, int]], int]:
    """(text, score, type) of each piece of a tokenizer.model, and the kind of the model: 1 unigram, 2 BPE.

    Source: sentencepiece_model.proto; its types are numbered as gguf.TokenType is.
    Raises ExportError if the file is not of this kind.
    """
    pieces, kind = [], 1
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                piece = dict(_fields(value))
                pieces.append((piece[1].decode("utf-8"), struct.unpack("<f", piece[2])[0], piece.get(3, 1)))
            elif field == 2:
                kind = dict(_fields(value)).get(3, 1)
    except (IndexError, KeyError, ValueError, AttributeError, TypeError, struct.error) as error:
        raise ExportError(
            f"{path}: not a model of SentencePiece ({type(error).__name__}: {error}). Take it out of the folder, "
            "tokenizer.json is enough, or copy it whole from where the model comes from."
        ) from error
    return pieces, kind


class SpmTokenizer:
    """llama.cpp's SPM tokenizer, as far as its result goes: `ids` of a text, special tokens in it too, without BOS.

    Source: llama.cpp, src/llama-vocab.cpp, llm_tokenizer_spm_session and tokenizer_st_partition.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        scores: Sequence[float],
        types: Sequence[int],
        *,
        space_prefix: bool,
        strips: bool = False,
    ) -> None:
        """strips: special tokens take the white space behind them, as in a model that is called Phi-3."""
        self.token_ids = {token: i for i, token in enumerate(tokens)}
        self.scores = scores
        self.space_prefix = space_prefix
        self.strips = strips
        found_first = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
        special = [(token, i) for i, token in enumerate(tokens) if types[i] in found_first]
        self.special = sorted(special, key=lambda entry: -len(entry[0].encode("utf-8")))

    def ids(self, text: str) -> list[int]:
        """The ids of a text."""
        made, after_special = [], True
        for fragment in self._fragments(text):
            if isinstance(fragment, int):
                made.append(fragment)
                after_special = True
                continue
            words = (" " if self.space_prefix and after_special else "") + fragment
            made += [i for symbol in self._merged(words.replace(" ", "▁")) for i in self._symbol_ids(symbol)]
            after_special = False
        return made

    def _fragments(self, text: str) -> list[str | int]:
        fragments: list[str | int] = [text] if text else []
        for token, i in self.special:
            if token not in text:
                continue
            cut: list[str | int] = []
            for fragment in fragments:
                if isinstance(fragment, int):
                    cut.append(fragment)
                    continue
                for k, part in enumerate(fragment.split(token)):
                    part = part.lstrip(" \t\n\v\f\r") if k and self.strips and token not in KEEP_SPACE else part
                    cut += ([i] if k else []) + ([part] if part else [])
            fragments = cut
        return fragments

    def _merged(self, text: str) -> list[str]:
        symbols: list[str] = list(text)
        before = list(range(-1, len(symbols) - 1))
        after = [*range(1, len(symbols)), -1]
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0 and (i := self.token_ids.get(symbols[left] + symbols[right])) is not None:
                heapq.heappush(queue, (-self.scores[i], left, right, len(symbols[left]) + len(symbols[right])))

        for right in range(1, len(symbols)):
            offer(right - 1, right)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [symbol for symbol in symbols if symbol]

    def _symbol_ids(self, symbol: str) -> list[int]:
        if symbol in self.token_ids:
            return [self.token_ids[symbol]]
        return [self.token_ids.get(f"<0x{byte:02X}>", -1) for byte in symbol.encode("utf-8")]


def _ranked_pieces(tokenizer: TrainedTokenizer) -> Iterator[tuple[int, str, float, int]]:
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(tokenizer.document["model"]["merges"]):
        ranks.setdefault(left + right, rank)
    for text, i in tokenizer.pieces.items():
        single = len(text) == 1 or _is_byte(text)
        score = float(-ranks[text]) if text in ranks else 0.0 if single else UNREACHED
        yield i, text, score, int(TokenType.BYTE if _is_byte(text) else TokenType.NORMAL)


def _own_pieces(tokenizer: TrainedTokenizer, path: Path) -> Iterator[tuple[int, str, float, int]]:
    pieces, kind = read_pieces(path)
    if kind != BPE:
        raise ExportError(
            f"{path}: a SentencePiece model of kind {kind}, where BPE ({BPE}) is known; a unigram model's best cut is "
            "not found by merging: its model cannot be written as GGUF."
        )
    own = {i: text for i, (text, _, _) in enumerate(pieces)}
    theirs = {i: text for text, i in tokenizer.pieces.items()}
    raise_collected(
        ExportError,
        f"{path}: not the tokenizer that tokenizer.json beside it is:",
        [
            f"{i}: {own.get(i)!r} here, {theirs.get(i)!r} there"
            for i in sorted(own.keys() | theirs.keys())
            if own.get(i) != theirs.get(i) and i not in tokenizer.added
        ],
        "Take tokenizer.model out of the folder if the model was trained with tokenizer.json.",
    )
    for i, (text, score, kind) in enumerate(pieces):
        # A user-defined piece is an ordinary one here, unless tokenizer.json has it among the added tokens.
        yield i, text, score, int(TokenType.NORMAL) if kind == TokenType.USER_DEFINED else kind


def _is_byte(text: str) -> bool:
    return re.fullmatch("<0x[0-9A-Fa-f]{2}>", text) is not None


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of each field of a protocol buffer's message; fixed-width values as their bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        wire = tag & 7
        if wire == 0:
            yield tag >> 3, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {at}")
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if at + size > len(message):
            raise ValueError(f"cut short at byte {len(message)}")
        yield tag >> 3, message[at : at + size]
        at += size
