"""The credit weights once more, in numpy: what the page computes, and how far rounding moves it.

The trainer's own formula is in `algorithms.credit`, which `observe` does not import; a test compares them.
Shape suffix: T tokens of a response.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def gate(entropy_T: NDArray[Any], settings: Mapping[str, Any]) -> Array:
    """Hn: entropy in nats, at least 0, over ln V and at most 1 with entropy_normalization "log_vocab"."""
    h_T = np.maximum(entropy_T.astype(np.float64), 0.0)
    if settings["entropy_normalization"] == "log_vocab":
        h_T = np.minimum(h_T / math.log(settings["vocab_size"]), 1.0)
    return h_T


def scores(distance_T: NDArray[Any], entropy_T: NDArray[Any], settings: Mapping[str, Any]) -> Array:
    """s = d Hn^kappa (section 4.4, arXiv 2605.03327), with 0^0 = 1."""
    return distance_T.astype(np.float64) * gate(entropy_T, settings) ** settings["kappa"]


def weights(distance_T: NDArray[Any], entropy_T: NDArray[Any], settings: Mapping[str, Any]) -> Array:
    """w = T softmax(s / tau) (Eq. 6, arXiv 2605.03327), mean 1. settings: tau, kappa, vocab_size and
    entropy_normalization."""
    s_T = scores(distance_T, entropy_T, settings) / settings["tau"]
    e_T = np.exp(s_T - s_T.max(initial=-np.inf))
    return e_T * (e_T.size / e_T.sum()) if e_T.size else e_T


def error_bound(
    distance_T: NDArray[Any],
    entropy_T: NDArray[Any],
    settings: Mapping[str, Any],
    half_steps: tuple[float, float],
) -> float:
    """The most that any weight can be off, relative to itself, when distance and entropy are off by at most
    the two half steps.

    With e the largest change of a score, every exponential changes by a factor of at most exp(e / tau)
    either way, and so does their sum: |w' / w - 1| <= exp(2 e / tau) - 1.
    """
    if not distance_T.size:
        return 0.0
    d_T, h_T = distance_T.astype(np.float64), entropy_T.astype(np.float64)
    low = scores(np.maximum(d_T - half_steps[0], 0), np.maximum(h_T - half_steps[1], 0), settings)
    high = scores(d_T + half_steps[0], h_T + half_steps[1], settings)
    s_T = scores(d_T, h_T, settings)
    change = max(float((high - s_T).max()), float((s_T - low).max()))
    return math.expm1(min(2 * change / settings["tau"], 700.0))


def effective_fraction(weights_T: NDArray[Any]) -> float:
    """(sum w)^2 / (T sum w^2), in (0, 1]; 1 where nothing is there."""
    w_T = weights_T.astype(np.float64)
    squares = float(np.square(w_T).sum()) * w_T.size
    return min(1.0, float(w_T.sum()) ** 2 / squares) if squares > 0 else 1.0


def top_share(weights_T: NDArray[Any], part: float) -> float:
    """Share of the credit on the heaviest ceil(part T) tokens; 0 where nothing is there."""
    total = float(weights_T.astype(np.float64).sum())
    if total <= 0:
        return 0.0
    heaviest = math.ceil(part * weights_T.size - 1e-9)
    return float(np.sort(weights_T.astype(np.float64))[-heaviest:].sum()) / total
