"""The tokenizer that a model was trained with, as transformers makes it of the model's folder, and how it is built."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lite.errors import ExportError


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer and the tokenizer.json that says what it really does.

    transformers makes some tokenizers anew from their class and leaves what the folder's tokenizer.json says of
    normalizer and pre-tokenizer (Llama's, Gemma's), so the document is read from the tokenizer in memory.
    """

    files: Path
    tokenizer: PreTrainedTokenizerBase
    document: dict[str, Any]  # tokenizer.json
    settings: dict[str, Any]  # tokenizer_config.json

    @property
    def pieces(self) -> dict[str, int]:
        """Ids of the tokens by their text, the added ones among them."""
        return self.tokenizer.get_vocab()

    @property
    def added(self) -> dict[int, dict[str, Any]]:
        """The added tokens of tokenizer.json by id: `content`, `special`, `normalized`, `lstrip`, `rstrip`."""
        return {entry["id"]: entry for entry in self.document["added_tokens"]}

    def surroundings(self) -> tuple[list[int], list[int]]:
        """The ids that it puts before and after a text. Raises ExportError if it changes the text's own by that."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
        if start is None:
            raise ExportError(
                f"{self.files}: the tokenizer makes {full} of 'a' with special tokens and {bare} without, where "
                "something before and after the same ids is expected. Its model cannot be written as GGUF."
            )
        return full[:start], full[start + len(bare) :]


def read_tokenizer(files: Path) -> TrainedTokenizer:
    """The tokenizer of a model's folder. Raises ExportError where there is none, or it cannot be read."""
    if not (files / "tokenizer.json").is_file():
        raise ExportError(
            f"{files}: there is no tokenizer.json. Expected a model's folder with the tokenizer that it was trained "
            "with: save it there with transformers' `AutoTokenizer.from_pretrained(…).save_pretrained(folder)`."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(files), local_files_only=True)
        document = json.loads(tokenizer.backend_tokenizer.to_str())
        path = files / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except Exception as error:  # whatever a half-written file makes transformers raise
        raise ExportError(f"{files}: its tokenizer cannot be read ({type(error).__name__}: {error}).") from error
    return TrainedTokenizer(files=files, tokenizer=tokenizer, document=document, settings=settings)
