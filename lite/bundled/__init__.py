"""The tiny chat model and preference data that `lite orpo` without arguments trains, with the script that made them.

The model was raised to open every answer with a needless preamble; the data prefers answers without one. `make.py`
makes everything else in this folder from `world.py`, the facts they talk about: `python -m lite.bundled.make`.
Importing this package loads none of it. Public: FOLDER.
"""

from pathlib import Path

__all__ = ["FOLDER"]

FOLDER: Path = Path(__file__).parent
