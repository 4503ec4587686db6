"""bitsandbytes, imported without torch's compiler: to be imported before anything else that imports it.

It hands a few functions of its fallbacks to `torch.compile` where they are defined, which loads inductor and takes as
long as torch itself; where that fails it keeps the functions as they are, and so it does here. None of them is used on
CUDA. On a CPU the 8-bit optimizers take them, uncompiled: no minute of compiling in the first step.
"""

from typing import Any

import torch


def _refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError("no compiler while bitsandbytes is imported")


_compile, torch.compile = torch.compile, _refuse
try:
    import bitsandbytes  # noqa: F401
finally:
    torch.compile = _compile
