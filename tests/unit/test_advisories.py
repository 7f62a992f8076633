"""Each advisory fires on a series made for it and stays silent on a healthy run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_dgpo.observe.advisories import (
    EARLY,
    RULES,
    WINDOW,
    AdvisoryWriter,
    Watch,
    advise,
    read_advisories,
)
from megatron_dgpo.observe.metrics import MetricsWriter, read_metrics

HEALTHY = Path(__file__).parent / "healthy_run"
FLOOR = 1e-4
STEPS = 30
BEGIN = 12
"""The step from which the constructed runs are ill."""
ILL: dict[str, dict[str, Any]] = {
    "uniform_credit": {"credit_effective_fraction": 0.9991},
    "concentrated_credit": {"credit_effective_fraction": 0.03, "credit_top10_share": 0.93},
    "zero_variance_groups": {"zero_variance_groups": 0.85},
    "log_prob_gap_growing": {"log_prob_gap": 5e-4},
    "entropy_collapse": {"entropy": 0.02},
    "length_runaway": {"response_length": 900.0, "truncated": 0.5},
}


def healthy_row(step: int) -> dict[str, Any]:
    """One that wobbles, as runs do."""
    wobble = math.sin(2.3 * step)
    return {
        "step": step,
        "phase": "train",
        "reward": 0.4 + 0.01 * step,
        "zero_variance_groups": 0.4 + 0.2 * wobble,
        "credit_effective_fraction": 0.85 + 0.03 * wobble,
        "credit_top10_share": 0.3 + 0.05 * wobble,
        "credit_tau": 0.05,
        "log_prob_gap": 2e-5 * (1 + 0.5 * wobble),
        "entropy": 0.4 / (1 + 0.02 * step),
        "response_length": 300.0 + 4 * step,
        "truncated": 0.05 + 0.03 * wobble,
    }


def series(name: str | None, steps: range = range(BEGIN, STEPS + 1)) -> list[dict[str, Any]]:
    """A healthy run but for one rule's metrics in these steps."""
    ill = ILL[name] if name else {}
    return [healthy_row(s) | (ill if s in steps else {}) for s in range(1, STEPS + 1)]


def test_a_case_for_every_rule() -> None:
    assert ILL.keys() == RULES.keys()


@pytest.mark.parametrize("name", ILL)
def test_it_fires_once_when_it_has_lasted(name: str) -> None:
    (found,) = advise(series(name), FLOOR)
    assert found.name == name
    # Medians turn after half of the window; uniform credit has to last for all of it.
    assert found.step == BEGIN + (WINDOW - 1 if name == "uniform_credit" else WINDOW // 2)
    assert "\n" not in found.line and found.message in found.line and found.suggestion in found.line
    assert advise(series(name, range(BEGIN, BEGIN + 2)), FLOOR) == []  # two odd batches are none


@pytest.mark.parametrize("name", ILL)
def test_a_second_episode_fires_again_and_a_gap_in_one_does_not(name: str) -> None:
    rows = series(name, range(10, 17)) + [
        row | {"step": row["step"] + STEPS} for row in series(name, range(10, 17))[EARLY:]
    ]
    assert [a.name for a in advise(rows, FLOOR)] == [name, name]
    gap = series(name)
    for row in gap[BEGIN + 6 : BEGIN + 9]:
        for metric in ILL[name]:
            row[metric] = healthy_row(row["step"])[metric]
    assert [a.name for a in advise(gap, FLOOR)] == [name]


def test_a_healthy_run_is_silent() -> None:
    assert advise(series(None), FLOOR) == []


def test_a_real_healthy_run_is_silent() -> None:
    rows = read_metrics(HEALTHY)
    assert len(rows) >= 40 and all(set(RULES[name].metrics) <= set(rows[-1]) for name in RULES)
    assert advise(rows, FLOOR) == []


@pytest.mark.parametrize("name", ILL)
def test_rows_without_a_number_change_nothing(name: str) -> None:
    """Such as those of steps without a reward: neither an error nor the end of an episode."""
    rows = series(name)
    want = advise(rows, FLOOR)
    for bad in (None, math.nan, math.inf, "text"):
        spoiled = []
        for row in rows:
            broken = {"step": row["step"]} if bad is None else row | dict.fromkeys(RULES[name].metrics, bad)
            spoiled += [broken, row]
        assert advise(spoiled, FLOOR) == want
    assert advise([{"step": 1}, {"step": 2, "phase": "train", "loss": 0.0}], FLOOR) == []


def test_short_and_few_do_not_count() -> None:
    """Single tokens have all credit of their response; a gap that is rounding may grow; so may lengths
    that end."""
    tokens = {"credit_top10_share": 1.0, "credit_effective_fraction": 0.99}
    assert advise([healthy_row(s) | tokens for s in range(1, STEPS)], FLOOR) == []
    rows = series("log_prob_gap_growing")
    assert advise(rows, 0.01) == []
    assert advise([r | {"truncated": 0.0} for r in series("length_runaway")], FLOOR) == []
    assert advise([r | {"response_length": 900.0, "truncated": 0.5} for r in series(None)], FLOOR) == []


def test_a_resumed_run_raises_the_same(tmp_path: Path) -> None:
    rows = series("entropy_collapse")
    for row in rows:
        row |= {"credit_effective_fraction": 0.9999}
    rows[20]["reward"] = math.nan
    want = advise(rows, FLOOR)
    assert [a.name for a in want] == ["uniform_credit", "entropy_collapse"]
    for last, resume_at in ((3, 2), (6, 4), (16, 13), (25, 14), (30, 30)):
        folder = tmp_path / str(last)
        for begin, end in ((0, last), (resume_at, STEPS)):
            with MetricsWriter(folder, tensorboard=False) as metrics:
                metrics.truncate_after(begin)
                advisories = AdvisoryWriter(folder, FLOOR)
                advisories.restart(read_metrics(folder, "train"))
                for row in rows[begin:end]:
                    values = {k: v for k, v in row.items() if k not in ("step", "phase")}
                    metrics.write(row["step"], values)
                    new = advisories.add({"step": row["step"], **values})
                    assert advisories.raised[len(advisories.raised) - len(new) :] == new
        assert advisories.raised == want
        assert read_advisories(folder) == [vars(a) for a in want]
    assert read_advisories(tmp_path) == []


def test_the_text_says_what_to_do() -> None:
    watch = Watch(FLOOR)
    rows = [healthy_row(s) | {"credit_effective_fraction": 0.9993, "credit_tau": 1.0} for s in range(1, 9)]
    (found,) = [a for row in rows for a in watch.add(row)]
    assert found.step == WINDOW
    assert "0.9993" in found.message and "GRPO" in found.message
    assert "tau (1 now)" in found.suggestion and 'tau = "auto"' in found.suggestion
    assert json.loads(json.dumps(vars(found)))["name"] == "uniform_credit"
