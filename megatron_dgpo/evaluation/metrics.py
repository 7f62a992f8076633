"""Avg@k, Pass@k and Cons@k: pure functions over the samples of a problem.

A sample whose reward *failed* is not a wrong sample: it is left out and counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from megatron_dgpo.types import Group


def is_correct(reward: float) -> bool:
    """A response counts as right from a reward of 1 on; partial credit is not right."""
    return reward >= 1.0


def avg_at_k(rewards: Sequence[float]) -> float:
    """Mean reward of a problem's k samples. Raises ValueError without any."""
    if not rewards:
        raise ValueError("avg@k needs at least one reward")
    return math.fsum(rewards) / len(rewards)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, in [0, 1].

    1 - C(n - c, k) / C(n, k) for c right samples among n (Chen et al. 2021, arXiv 2107.03374, Eq. 1).

    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k: k is {k}, expected 1 to the number of samples, {num_samples}")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@k: {num_correct} right samples of {num_samples}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def cons_at_k(answers: Sequence[str | None], rewards: Sequence[float | None]) -> float:
    """1 where the majority's answer is right, else 0.

    `answers` are canonical, so that equal answers vote together; None (no answer) has no vote, and a
    tie goes to the answer that was seen first. It is right where more than half of its samples that have
    a reward are. 0 where nobody votes or none of the majority's samples has a reward.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    majority = max(votes, key=votes.__getitem__)  # max keeps the first; Counter keeps the order of arrival
    judged = [is_correct(r) for a, r in zip(answers, rewards, strict=True) if a == majority and r is not None]
    return float(2 * sum(judged) > len(judged))


def by_problem(groups: Sequence[Group], k: int, *, fewer: Sequence[int] = ()) -> dict[str, list[float]]:
    """avg@k, pass@k and cons@k of each problem that has a scored sample, in order, and pass@j for the j of
    `fewer`.

    `avg@k` averages all samples of a problem, `cons@k` lets the first k vote (by `Sample.answer`), `pass@k`
    uses the unbiased estimator; where failures leave fewer than k samples, pass@k is taken over those.

    Raises ValueError where a group has fewer than k samples.
    """
    values: dict[str, list[float]] = {f"avg@{k}": [], f"pass@{k}": [], f"cons@{k}": []}
    values |= {f"pass@{j}": [] for j in fewer}
    for group in groups:
        if len(group.samples) < k:
            raise ValueError(
                f"prompt {group.prompt.id} has {len(group.samples)} samples, expected {k} or more"
            )
        rewards = [sample.reward for sample in group.samples if sample.reward is not None]
        if not rewards:
            continue
        values[f"avg@{k}"].append(avg_at_k(rewards))
        for j in {k, *fewer}:
            right = sum(map(is_correct, rewards))
            values[f"pass@{j}"].append(pass_at_k(len(rewards), right, min(j, len(rewards))))
        voters = group.samples[:k]
        values[f"cons@{k}"].append(cons_at_k([s.answer for s in voters], [s.reward for s in voters]))
    return values


def summarize(groups: Sequence[Group], k: int, *, fewer: Sequence[int] = ()) -> dict[str, float]:
    """The metrics of an evaluation: means over problems (see `by_problem`) or samples.

    Problems of which every sample failed are left out and counted in `num_unscored_problems`.
    `truncation_rate` and `mean_response_tokens` are over all samples.

    Raises ValueError without groups, or where a group has fewer than k samples.
    """
    if not groups:
        raise ValueError("nothing to summarize: no groups")
    values = by_problem(groups, k, fewer=fewer)
    samples = [sample for group in groups for sample in group.samples]
    return {
        **{name: _mean(of) for name, of in values.items()},
        "truncation_rate": _mean([float(sample.finish_reason == "length") for sample in samples]),
        "mean_response_tokens": _mean([float(len(sample.token_ids)) for sample in samples]),
        "num_problems": float(len(groups)),
        "num_samples": float(len(samples)),
        "num_failed": float(sum(sample.reward is None for sample in samples)),
        "num_unscored_problems": float(len(groups) - len(values[f"avg@{k}"])),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
