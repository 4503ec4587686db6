"""The tiny chat model and preference data that `lite orpo` without arguments trains, with the script that made them.

The model was raised to open every answer with a needless preamble; the data prefers answers without one. `make.py`
(`python -m lite.bundled.make`) makes both from `world.py`, the facts, and `conversations.py`, the way they are told.
Importing this package loads none of it. Public: FOLDER.
"""

from pathlib import Path

__all__ = ["FOLDER"]

FOLDER: Path = Path(__file__).parent
