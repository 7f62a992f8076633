"""Spread of credit response by response, and quantiles, in numpy: the truth for the product's, of which it
uses nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def spread(responses: Sequence[tuple[Sequence[float], float]]) -> dict[str, float]:
    """The metrics of (weights of its tokens, advantage) of each response; those of nothing are left out."""
    found: dict[str, list[float]] = {}
    for weights, advantage in responses:
        w = np.asarray(weights, dtype=np.float64)
        if len(w) == 0:
            continue
        fraction = w.sum() ** 2 / (len(w) * (w**2).sum())
        heaviest = np.sort(w)[::-1]
        shares = {p: heaviest[: math.ceil(len(w) / p)].sum() / w.sum() for p in (100, 10)}
        values = {
            "credit_effective_fraction": fraction,
            "credit_weight_max": w.max(),
            "credit_top1_share": shares[100],
            "credit_top10_share": shares[10],
        }
        if len(w) > 1 and len(set(w.tolist())) > 1:
            values["credit_position_correlation"] = np.corrcoef(w, np.arange(len(w)))[0, 1]
        if advantage != 0:
            side = "right" if advantage > 0 else "wrong"
            values[f"credit_effective_fraction_{side}"] = fraction
            values[f"credit_top10_share_{side}"] = shares[10]
        for name, value in values.items():
            found.setdefault(name, []).append(float(value))
    means = {name: float(np.mean(values)) for name, values in found.items()}
    tokens = np.concatenate([np.asarray(w, dtype=np.float64) for w, _ in responses])
    return means | {"credit_weight_variance": float(np.mean((tokens - 1) ** 2))}


def token_quantiles(name: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """The quantiles that a step's metrics have."""
    return {
        f"{name}_p{p}": float(np.quantile(np.asarray(values), p / 100, method="inverted_cdf"))
        for p in (10, 50, 90, 99)
    }
