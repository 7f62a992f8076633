"""DAPO (arXiv 2503.14476): decoupled clip, one mean over all tokens, dynamic sampling, overlong penalty."""

from __future__ import annotations

from megatron_dgpo.algorithms.base import Algorithm


class Dapo(Algorithm):
    """The surrogate of Eq. 8 there: clip_high above clip_low ("clip-higher", section 3.1) and the mean over
    all tokens of the mini-batch (section 3.3).

    Dynamic sampling (section 3.2) and the soft overlong punishment (Eq. 13) are settings of rollout and
    reward, which the preset sets.
    """
