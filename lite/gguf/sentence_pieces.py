"""SentencePiece's BPE in a GGUF file: a score for each token, by which llama.cpp merges as the tokenizer does."""

from lite.errors import ExportError
from lite.gguf.tokenizer import TrainedTokenizer


def scored_pieces(tokenizer: TrainedTokenizer, rows: int) -> tuple[list[str], list[float], list[int], bool]:
    """Tokens, scores, types (gguf.TokenType) and whether a text begins as if a space stood before it; each by id."""
    raise ExportError(f"{tokenizer.files}: SentencePiece tokenizers are not written yet ({rows} rows).")
