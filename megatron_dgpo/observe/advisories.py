"""What a run's metrics say is going wrong, each with a suggestion.

A rule looks at the training rows so far and nothing else (`advise`), so that a resumed run raises what the
uninterrupted one does. It is raised once an episode: when it begins to hold, and again only after it has
not held for `REST` steps.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dgpo.observe import jsonl

FILE = "advisories.jsonl"

WINDOW = 5
"""Steps that a rule looks at: one batch may be odd, and after five little of a run is lost."""
REST = 2 * WINDOW
"""Steps that end an episode: one batch in which all is well does not."""
EARLY = 5
"""The first steps of a run, which growth and collapse are measured against: its own start."""
UNIFORM_FRACTION = 0.995
"""The weights' variance in a response is 1 / fraction - 1: above this, their deviation is below 7%."""
CONCENTRATED_SHARE = 0.8
"""Of the credit on a tenth of the tokens: the other nine tenths share a fifth."""
CONCENTRATED_FRACTION = 0.25
"""Below it too, since the heaviest of two or three tokens have such a share whatever the weights are. With
a share of 0.8 on a tenth of many tokens the fraction is at most 0.15."""
MOST_GROUPS = 0.75
"""Of the groups without variance: what is left is noisy as a batch of a quarter of the size."""
GAP_GROWTH = 3.0
"""Between batches the mean gap changes by tens of percents; from other causes than rounding it grows by
orders of magnitude."""
GAP_FLOORS = {"float32": 1e-4, "bfloat16": 0.01}
"""Nats by precision of the parameters. Rounding alone makes mean gaps of about 1e-6 and a few 1e-3."""
ENTROPY_LEFT = 0.2
"""Of the entropy at the start: nearly all tokens are then decided, and the samples of a group alike. A run
that learns may well halve it."""
LENGTH_GROWTH = 1.5
"""Responses that reason more grow too, so growth counts only together with truncation:"""
TRUNCATED, MORE_TRUNCATED = 0.2, 0.1
"""A fifth of the responses, and a tenth more than at the start."""

Series = Mapping[str, Sequence[float]]
"""Metric -> its values at the steps that have all of a rule's metrics."""
Finding = tuple[str, str]
"""Message and suggestion."""


@dataclass(frozen=True)
class Advisory:
    step: int
    name: str
    message: str
    suggestion: str

    @property
    def line(self) -> str:
        return f"advisory at step {self.step}, {self.name}: {self.message}. Suggestion: {self.suggestion}"


def _uniform_credit(s: Series, _: float) -> Finding | None:
    fraction = min(s["credit_effective_fraction"][-WINDOW:])
    if not fraction > UNIFORM_FRACTION:
        return None
    return (
        f"for {WINDOW} steps the effective token fraction has been {fraction:.4f} or more: all credit "
        "weights are near 1, so that DGPO trains much as GRPO does",
        f"nothing is broken; for other credit lower algorithm.tau ({s['credit_tau'][-1]:.3g} now), or "
        'set algorithm.tau = "auto" and algorithm.effective_fraction to what you want',
    )


def _concentrated_credit(s: Series, _: float) -> Finding | None:
    share = _latest(s["credit_top10_share"])
    fraction = _latest(s["credit_effective_fraction"])
    if not (share > CONCENTRATED_SHARE and fraction < CONCENTRATED_FRACTION):
        return None
    return (
        f"a tenth of a response's tokens has {share:.0%} of its credit (effective token fraction "
        f"{fraction:.3f}): the others learn next to nothing",
        f"raise algorithm.tau ({s['credit_tau'][-1]:.3g} now), or algorithm.effective_fraction where "
        'algorithm.tau = "auto"',
    )


def _zero_variance_groups(s: Series, _: float) -> Finding | None:
    part = _latest(s["zero_variance_groups"])
    if not part > MOST_GROUPS:
        return None
    return (
        f"in {part:.0%} of the groups all rewards are equal (mean reward {_latest(s['reward']):.3g}): they "
        "teach nothing",
        "rollout.dynamic_sampling = true draws other prompts instead; take harder prompts where the groups "
        "are all right, easier ones where they are all wrong",
    )


def _log_prob_gap_growing(s: Series, floor: float) -> Finding | None:
    gaps = s["log_prob_gap"]
    early, now = _earliest(gaps), _latest(gaps)
    if not (now > floor and now > GAP_GROWTH * early):
        return None
    return (
        f"the engine's log-probs are {now:.2g} nats from the trainer's in the mean, {early:.2g} at the start",
        "compare sync_log_prob_gap and staleness, the engine's precision and its sampling; "
        "algorithm.tis_cap = 2.0 weighs tokens by how far the two are apart",
    )


def _entropy_collapse(s: Series, _: float) -> Finding | None:
    early, now = _earliest(s["entropy"]), _latest(s["entropy"])
    if not now < ENTROPY_LEFT * early:
        return None
    return (
        f"the entropy is {now:.3g} nats, {early:.3g} at the start: samples of a prompt are hardly different "
        "any more",
        "raise algorithm.clip_high (DAPO has 0.28), or lower optimizer.lr; where the task is solved, stop",
    )


def _length_runaway(s: Series, _: float) -> Finding | None:
    lengths, cut = s["response_length"], s["truncated"]
    early, now = _earliest(lengths), _latest(lengths)
    grown = now > LENGTH_GROWTH * early
    if not (grown and _latest(cut) > max(TRUNCATED, _earliest(cut) + MORE_TRUNCATED)):
        return None
    return (
        f"responses have {now:.4g} tokens, {early:.4g} at the start, and {_latest(cut):.0%} are cut",
        'read some in samples/; a term {name = "overlong"} in reward.terms makes length cost, and a higher '
        "rollout.max_new_tokens lets them end",
    )


def _latest(values: Sequence[float]) -> float:
    return statistics.median(values[-WINDOW:])


def _earliest(values: Sequence[float]) -> float:
    return statistics.median(values[:EARLY])


@dataclass(frozen=True)
class Rule:
    metrics: tuple[str, ...]
    """A row without one of them, or with one that is not finite, changes nothing."""
    steps: int
    """Rows that it needs."""
    finding: Callable[[Series, float], Finding | None]
    """Of the series and the floor of the log-prob gap; None where all is well."""


_CREDIT = ("credit_effective_fraction", "credit_tau")
RULES: dict[str, Rule] = {
    "uniform_credit": Rule(_CREDIT, WINDOW, _uniform_credit),
    "concentrated_credit": Rule((*_CREDIT, "credit_top10_share"), WINDOW, _concentrated_credit),
    "zero_variance_groups": Rule(("zero_variance_groups", "reward"), WINDOW, _zero_variance_groups),
    "log_prob_gap_growing": Rule(("log_prob_gap",), EARLY + WINDOW, _log_prob_gap_growing),
    "entropy_collapse": Rule(("entropy",), EARLY + WINDOW, _entropy_collapse),
    "length_runaway": Rule(("response_length", "truncated"), EARLY + WINDOW, _length_runaway),
}


class _State:
    """What a rule has seen, and whether it holds."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.series: dict[str, list[float]] = {name: [] for name in rule.metrics}
        self.quiet = REST
        """Steps since it last held."""

    def add(self, row: Mapping[str, Any], gap_floor: float) -> Finding | None:
        """The finding that begins an episode."""
        values = [row.get(name) for name in self.rule.metrics]
        numbers = [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
        if len(numbers) < len(values):
            return None
        for name, number in zip(self.rule.metrics, numbers, strict=True):
            self.series[name].append(number)
        if len(self.series[self.rule.metrics[0]]) < self.rule.steps:
            return None
        found = self.rule.finding(self.series, gap_floor)
        begins = found is not None and self.quiet >= REST
        self.quiet = self.quiet + 1 if found is None else 0
        return found if begins else None


class Watch:
    """Takes the rows of a run one after the other.

    gap_floor: the gap of log-probs, in nats, below which its growth means nothing (`GAP_FLOORS`).
    """

    def __init__(self, gap_floor: float) -> None:
        self._gap_floor = gap_floor
        self._states = {name: _State(rule) for name, rule in RULES.items()}

    def add(self, row: Mapping[str, Any]) -> list[Advisory]:
        """The advisories that begin with this row of training metrics."""
        found = {name: state.add(row, self._gap_floor) for name, state in self._states.items()}
        return [Advisory(row["step"], name, *finding) for name, finding in found.items() if finding]


def advise(rows: Iterable[Mapping[str, Any]], gap_floor: float) -> list[Advisory]:
    """All advisories of a run, from its training rows in order (`metrics.read_metrics`)."""
    watch = Watch(gap_floor)
    return [advisory for row in rows for advisory in watch.add(row)]


class AdvisoryWriter:
    """Keeps `advisories.jsonl` in the run's folder, rows {step, name, message, suggestion}; for one rank
    only. It is what `advise` says of the rows in metrics.jsonl."""

    def __init__(self, folder: str | Path, gap_floor: float) -> None:
        self._path = Path(folder) / FILE
        self._gap_floor = gap_floor
        self.restart([])

    def restart(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Begin after these rows: those that a resumed run keeps."""
        self._watch = Watch(self._gap_floor)
        self.raised = [advisory for row in rows for advisory in self._watch.add(row)]
        jsonl.write(self._path, map(dataclasses.asdict, self.raised))

    def add(self, row: Mapping[str, Any]) -> list[Advisory]:
        """The advisories that begin with this row, written before they are returned."""
        new = self._watch.add(row)
        if new:
            self.raised += new
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(jsonl.dump(dataclasses.asdict(advisory)) for advisory in new)
        return new


def read_advisories(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's folder; none where there is no file. Raises ValueError as `jsonl.read` does."""
    path = Path(folder) / FILE
    return jsonl.read(path) if path.exists() else []
