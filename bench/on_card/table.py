"""The table of bench/card.py: a line as each row comes, and all of them as Markdown.

Shares are of the floor: the time that the row's own products and attentions take at the card's matrix rate, as it was
measured in the same run and, as `published`, as is known of its kind (165 TFLOP/s of a 4090, 790 of an H100 or H200).
`x` is how many times as fast lite is as the row's contender on the same example.
"""

from collections.abc import Iterable

from measuring import Found

from lite.sizes import GIB

PHASES = ("transfers", "forward", "head", "backward", "update")
COLUMNS = {
    "model": 12, "method": 6, "contender": 19, "tokens": 18, "recomputed": 10, "s/step": 7, "tokens/s": 8,
    "TFLOP/s": 7, "floor": 6, "published": 9, "allocated": 9, "reserved": 8, "planned": 8, "ratio": 6,
    "forward+head+backward+update ms": 31, "operators": 9, "x": 5,
}  # fmt: skip


def cells(row: Found, rows: Iterable[Found] = ()) -> list[str]:
    """A row's figures as text, in the order of COLUMNS."""
    lite = next((r for r in rows if _same(r, row) and r["contender"] == "lite" and "seconds" in r), None)
    size = "+".join(f"{count:,}" for count in row["row"]) if row.get("row") else ""
    start = [row["model"], row["method"], row["contender"], size]
    settings = row.get("settings") or {}
    start.append(str(settings.get("recompute_layers", "")))
    if "seconds" not in row:
        return start + [row.get("out_of_memory") or row.get("failed") or ""] + [""] * (len(COLUMNS) - 6)
    return [
        *start, f"{row['seconds']:.3f}", f"{row['tokens_per_second']:,.0f}", _figure(row, "tflop_per_second", ".0f"),
        _figure(row, "floor_share", ".0%"), _figure(row, "floor_share_published", ".0%"), _gib(row, "allocated_bytes"),
        _gib(row, "reserved_bytes"), _gib(row, "planned_bytes"), _figure(row, "ratio", ".3f"),
        "+".join(f"{1e3 * row['phases'].get(name, 0):.0f}" for name in PHASES[1:]) if row.get("phases") else "",
        "/".join(str(count) for count in row.get("operators_per_layer", {}).values()),
        f"{row['seconds'] / lite['seconds']:.2f}" if lite and row["contender"] != "lite" else "",
    ]  # fmt: skip


def line(found: list[str]) -> str:
    """Cells under the heading of the terminal's table."""
    return " ".join(f"{cell:<{width}}" for cell, width in zip(found, COLUMNS.values(), strict=True)).rstrip()


def markdown(rows: list[Found], head: str) -> str:
    """The whole table, with what it was measured on above; rows without a cap where under it memory ran out."""
    lines = [head, "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(cells(row, rows))} |")
        if "uncapped" in row:
            without = row["uncapped"] | {key: row[key] for key in ("model", "method", "row")}
            shown = cells(without | {"contender": f"{row['contender']}, no cap"}, rows)
            lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def galore_lines(row: Found) -> list[str]:
    """A row of --galore in words, a line a kind of step; then what torchtune publishes."""
    name = (
        f"{row['model']} {row['method']} {row['contender']}, {row['row'][0]:,} x {'+'.join(map(str, row['row'][1:]))}"
    )
    if "seconds" not in row:
        return [f"{name}: {row.get('out_of_memory') or row.get('failed')}"]
    lines = [f"{name}: planned {_gib(row, 'planned_bytes')} GiB, ratio {_figure(row, 'ratio', '.3f')}"]
    for kind in ("heaviest", "steady", "without refresh"):
        one = row[kind]
        lines.append(
            f"  {kind:16s} {one['seconds']:8.3f} s/step {one['tokens_per_second']:8,.0f} tokens/s, "
            f"{one['refreshes_per_step']:.1f} refreshes a step, allocated {_gib(one, 'allocated_bytes')} GiB"
        )
    p = row["published"]
    return [*lines, f"  torchtune, {p['card']} ({p['tflops']} TFLOP/s): {p['peak_gib']} GiB, "
            f"{p['tokens_per_second']:,} tokens/s, published; this card: {row['card_tflops']:.0f} TFLOP/s"]  # fmt: skip


def _same(one: Found, other: Found) -> bool:
    return all(one.get(key) == other.get(key) for key in ("model", "method", "row"))


def _figure(row: Found, key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""


def _gib(row: Found, key: str) -> str:
    return f"{row[key] / GIB:.2f}" if key in row else ""
