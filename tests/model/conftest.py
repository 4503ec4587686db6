"""Folders of tiny models, and token ids for them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.model.tiny import VOCABULARY, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the folder of a tiny saved model by its architecture, once a session. Do not write into it."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            tiny_model(architecture).save_pretrained(made[architecture])
            tiny_tokenizer().save_pretrained(made[architecture])
        return made[architecture]

    return folder


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids of two rows, longer than a sliding window: (2, 24)."""
    return torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
