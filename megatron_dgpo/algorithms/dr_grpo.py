"""Dr. GRPO (arXiv 2503.20783): GRPO without its two biases."""

from __future__ import annotations

from megatron_dgpo.algorithms.base import Algorithm


class DrGrpo(Algorithm):
    """Advantages r_i - mean(r), not divided by the deviation, which favours questions that are too easy or
    too hard; sums over tokens divided by one constant, the longest response, not by the response's length,
    which favours long wrong answers (section 3.1 and appendix A there).
    """
