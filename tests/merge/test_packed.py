"""The tensor that was made last is kept, and none that could not be made."""

import pytest
import torch

from lite.merge.packed import Last


def test_one_that_fails_leaves_none() -> None:
    """The one before it is made anew then."""
    last = Last()
    assert last.get("a", lambda: torch.ones(2)).tolist() == [1, 1]
    with pytest.raises(ZeroDivisionError):
        last.get("b", lambda: torch.ones(1 // 0))
    assert last.get("a", lambda: torch.zeros(1)).tolist() == [0]
