"""Lines of metrics.jsonl, and the averages that go into them."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from lite.train import metrics


def test_averages_are_over_the_steps_of_the_interval() -> None:
    """(1 + 2) / 2 = 1.5, then 5 alone; tokens count on."""
    interval = metrics.Interval()
    interval.add({"loss": 1.0, "rewards/margins": 0.0}, 10)
    interval.add({"loss": 2.0, "rewards/margins": 1.0}, 20)
    assert interval.averages() == {"loss": 1.5, "rewards/margins": 0.5}
    interval.add({"loss": 5.0, "rewards/margins": 3.0}, 5)
    assert interval.averages() == {"loss": 5.0, "rewards/margins": 3.0}
    assert interval.num_tokens == 35


def test_a_metric_counts_the_steps_that_had_it() -> None:
    """A step without a desirable row has no reward of one: (2 + 4) / 2 = 3. A loss that is NaN is told."""
    interval = metrics.Interval()
    for reward, loss in ((2.0, 1.0), (math.nan, 3.0), (4.0, 5.0)):
        interval.add({"loss": loss, "rewards/chosen": reward}, 1)
    assert interval.averages() == {"loss": 3.0, "rewards/chosen": 3.0}
    interval.add({"loss": math.nan}, 1)
    assert math.isnan(interval.averages()["loss"])


def test_an_interval_survives_a_checkpoint() -> None:
    """Saved between two lines and read back, it gives the average that it would have given."""
    undisturbed, saved = metrics.Interval(), metrics.Interval()
    for interval in (undisturbed, saved):
        interval.add({"loss": 0.1}, 3)
        interval.add({"loss": 0.2}, 3)
    saved = metrics.Interval(**json.loads(json.dumps(asdict(saved))))
    for interval in (undisturbed, saved):
        interval.add({"loss": 0.3}, 3)
    assert saved.averages() == undisturbed.averages()


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, {"step": 1, "loss": 1.0})
    metrics.append(path, {"step": 2, "loss": float("nan")})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert metrics.read(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}]


def test_cut_goes_back_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, {"step": 1})
    length = metrics.size(path)
    before = path.read_bytes()
    metrics.append(path, {"step": 1, "eval_loss": 2.0})  # same step, later
    metrics.cut(path, length)
    assert path.read_bytes() == before
    metrics.cut(tmp_path / "not there", 0)


def test_evaluation_finds_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for record in (
        {"step": 0, "eval_loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "epoch": 1.0, "eval_loss": 1.0},
    ):
        metrics.append(path, record)
    assert metrics.evaluation(path, 2) == {"eval_loss": 1.0}
    assert metrics.evaluation(path, 1) is None
    metrics.append(path, {"step": 3, "eval_loss": math.nan})
    assert math.isnan(metrics.evaluation(path, 3)["eval_loss"])
