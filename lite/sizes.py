"""Sizes of memory as people write them: `24GB`, `22.5 GiB`, `512MB`; a card's GB are GiB, as its maker means them."""

import re

GIB, MIB = 2**30, 2**20
_UNITS = {"": GIB, "g": GIB, "m": 2**20, "t": 2**40}
_UNITS |= {f"{unit}{ending}": _UNITS[unit] for unit in "gmt" for ending in ("b", "ib")}
EXPECTED = "a size such as 24GB"


def size_bytes(text: str) -> int | None:
    """The bytes that a size stands for; None if it is none, or is nothing."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS:
        return None
    return round(float(found[1]) * _UNITS[found[2]]) or None


def in_gib(count_bytes: float) -> str:
    """A size for people: `9.1 GiB`, below 0.1 GiB in MiB."""
    return f"{count_bytes / GIB:.1f} GiB" if count_bytes >= 0.1 * GIB else f"{count_bytes / 2**20:.1f} MiB"
