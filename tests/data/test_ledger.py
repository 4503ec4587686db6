"""The ledger as people and programs read it, and where it stops a run."""

import json

import pytest

from lite.data.examples import Place
from lite.data.ledger import Ledger
from lite.data.problems import Problem, told
from lite.errors import DataError


def places(*rows: int, file: str = "pairs.jsonl") -> list[Place]:
    return [Place(file, row) for row in rows]


def test_lines_and_json():
    ledger = Ledger(kept=96, notes=["99 rows read as preference (prompt, chosen, rejected)"])
    ledger.cut["turns cut"] += places(4, 9)
    ledger.dropped["too long"] += [*places(5), *places(2, file="eval.jsonl")]
    ledger.skip([Problem(Place("pairs.jsonl", 7), "no format reads it.\n    Known formats: …")])
    assert ledger.lines() == [
        "kept 96 of 99 rows (2 cut, 2 dropped, 1 skipped as bad)",
        "  cut: turns cut: 2 rows: pairs.jsonl:4, 9",
        "  dropped: too long: 2 rows: pairs.jsonl:5; eval.jsonl:2",
        "  bad: no format reads it: 1 row: pairs.jsonl:7",
        "  99 rows read as preference (prompt, chosen, rejected)",
    ]
    assert json.loads(json.dumps(ledger.to_dict())) == {
        "rows": 99,
        "kept": 96,
        "cut": {"turns cut": {"pairs.jsonl": [4, 9]}},
        "dropped": {"too long": {"pairs.jsonl": [5], "eval.jsonl": [2]}},
        "bad": {"no format reads it.\n    Known formats: …": {"pairs.jsonl": [7]}},
        "remarks": {},
        "notes": ["99 rows read as preference (prompt, chosen, rejected)"],
    }
    assert Ledger(kept=3).lines() == ["kept 3 of 3 rows"]


def test_many_rows_are_not_all_printed():
    ledger = Ledger()
    ledger.cut["turns cut"] += places(*range(1, 31))
    assert ledger.lines()[1] == "  cut: turns cut: 30 rows: pairs.jsonl:1, 2, 3, 4, 5, 6, 7, 8, 9, 10 …"


def test_more_than_five_percent_dropped_stops():
    """5 of 100 is 5 %, 5 of 99 is more; bad rows count on neither side."""
    ledger = Ledger(kept=95)
    ledger.dropped["too long (2048 tokens)"] += places(1, 2, 3, 4, 5)
    ledger.check(2048)
    ledger.kept = 94
    ledger.skip(Problem(place, "not JSON") for place in places(*range(6, 50)))
    with pytest.raises(DataError) as error:
        ledger.check(2048)
    assert str(error.value) == (
        "5 of 99 rows do not fit and would be dropped: more than 5 %.\n"
        "  dropped: too long (2048 tokens): 5 rows: pairs.jsonl:1, 2, 3, 4, 5\n"
        "Raise --max-length (now 2048 tokens), or go on without them: --allow-dropped."
    )


def test_the_same_problem_is_told_once():
    same = [Problem(place, "no format reads it.") for place in places(*range(1, 9))]
    assert told([*same, Problem(Place("pairs.jsonl", 9), "not JSON.")]) == [
        "pairs.jsonl:1: no format reads it.\n    (7 more rows have the same problem: 2, 3, 4, 5, 6 …)",
        "pairs.jsonl:9: not JSON.",
    ]
    assert told(same[:2]) == ["pairs.jsonl:1: no format reads it.\n    (1 more row has the same problem: 2)"]
