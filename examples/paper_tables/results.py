"""What the runs gave, as numbers: read from their folders, and compared with paired tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from arms import ARMS, DAPO, TIMED, Run, Scale
from experiments import (
    EQUAL_SAMPLES,
    REPORTING,
    TOP_PS,
    Experiments,
    metrics,
    samples_by_step,
    score_file,
    scored,
    step_at,
)
from scipy import stats

DAPO_EQUAL = "dapo, equal samples"
LEVEL = 0.95
WARM_STEPS = 2
"""Left out of timings: the first steps of a run."""


@dataclass
class Outcome:
    """Of one run. Scores are on the reporting prompts, in [0, 1]: `avg` at top-p 1, `paper_avg`, `cons` and
    `pass` at the paper's 0.7. The curve is on the tuning prompts, at top-p 1."""

    arm: str
    seed: int
    cold_start: int
    scores: dict[str, float]
    samples_drawn: float = 0.0
    """To train the policy, those that dynamic sampling left out among them."""
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    """Step, samples drawn, avg@4."""
    means: dict[str, float] = field(default_factory=dict)
    """Of some metrics over the run's steps."""
    explained_variance: list[float] = field(default_factory=list)


MEANS = ("credit_effective_fraction", "credit_tau", "entropy_normalized", "hellinger", "zero_variance_groups")


def read(experiments: Experiments) -> list[Outcome]:
    """Every run that is complete."""
    scale, found = experiments.scale, []
    wanted = dict.fromkeys(scale.first_runs())
    wanted |= dict.fromkeys(Run(arm, seed) for arm in ARMS for seed in scale.seeds)
    k = scale.samples_per_problem
    for run in wanted:
        folder = experiments.run_folder(run)
        if not scored(folder, REPORTING):
            continue
        cold = scale.cold_start(run.seed)
        outcome = Outcome(run.arm, run.seed, cold, _scores(folder, REPORTING, k))
        _add_history(outcome, folder, scale)
        found.append(outcome)
        if run.arm == DAPO:
            equal = Outcome(DAPO_EQUAL, run.seed, cold, _scores(folder, EQUAL_SAMPLES, k))
            equal.samples_drawn = samples_by_step(folder, scale)[step_at(folder, scale) - 1]
            found.append(equal)
    return found


def _scores(folder: Path, name: str, k: int) -> dict[str, float]:
    paper, full = (json.loads(score_file(folder, name, top_p).read_text()) for top_p in TOP_PS)
    scores = {of: paper[f"{of}@{k}"] for of in ("cons", "pass")}
    return {"avg": full[f"avg@{k}"], "paper_avg": paper[f"avg@{k}"], **scores}


def _add_history(outcome: Outcome, folder: Path, scale: Scale) -> None:
    drawn = [0.0, *samples_by_step(folder, scale)]
    outcome.samples_drawn = drawn[-1]
    for row in metrics(folder, "eval"):
        step = int(row["step"])
        outcome.curve.append((step, drawn[step], row["avg@4"]))
    rows = metrics(folder, "train")
    for name in MEANS:
        values = [row[name] for row in rows if name in row]
        if values:
            outcome.means[name] = fmean(values)
    outcome.explained_variance = [row["explained_variance"] for row in rows if "explained_variance" in row]


def timings(experiments: Experiments) -> dict[str, list[dict[str, float]]]:
    """By algorithm, a row of medians for each round; the run's peak of resident memory in bytes."""
    found: dict[str, list[dict[str, float]]] = {}
    names = ("time/generate", "time/prepare", "time/update", "time/step", "tokens_per_second")
    for arm in TIMED:
        for round_ in range(experiments.scale.timed_rounds):
            rows = metrics(experiments.timed_folder(arm, round_), "train")[WARM_STEPS:]
            row = {name: float(np.median([r[name] for r in rows])) for name in names}
            row["memory"] = max(r["memory/peak_rss_bytes"] for r in rows)
            found.setdefault(arm, []).append(row)
    return found


# --- statistics -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval (Student's t); no interval from one seed."""

    mean: float
    low: float
    high: float
    n: int
    p: float = float("nan")
    """Of a mean of 0, two-sided."""


def estimate(values: Sequence[float]) -> Estimate:
    mean = fmean(values)
    if len(values) < 2:
        nan = float("nan")
        return Estimate(mean, nan, nan, len(values))
    if np.ptp(values) == 0:  # t is 0/0 where the runs are equal, as with two settings that come to the same
        return Estimate(mean, mean, mean, len(values), 1.0 if mean == 0 else 0.0)
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(LEVEL)
    return Estimate(mean, float(low), float(high), len(values), float(test.pvalue))


def paired(outcomes: Sequence[Outcome], arm: str, base: str, seeds: Sequence[int]) -> Estimate:
    """Of the difference arm - base in `avg` between runs of the same seed and cold start (paired t-test)."""
    values, against = by_seed(outcomes, arm), by_seed(outcomes, base)
    return estimate([values[seed] - against[seed] for seed in seeds])


def by_seed(outcomes: Sequence[Outcome], arm: str, score: str = "avg") -> dict[int, float]:
    return {o.seed: o.scores[score] for o in outcomes if o.arm == arm}


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values of one family of tests; NaN stays NaN and counts."""
    order = sorted(range(len(p_values)), key=lambda i: (np.isnan(p_values[i]), p_values[i]))
    adjusted, highest = [float("nan")] * len(p_values), 0.0
    for rank, index in enumerate(order):
        if not np.isnan(p_values[index]):
            highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
            adjusted[index] = highest
    return adjusted


def to_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [vars(outcome) for outcome in outcomes]
