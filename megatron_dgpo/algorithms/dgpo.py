"""DGPO (arXiv 2605.03327): a response's advantage goes to the tokens where the policy has moved away
from the reference and is still undecided."""

from __future__ import annotations

from megatron_dgpo.algorithms.base import Algorithm


class Dgpo(Algorithm):
    """The clipped surrogate of Eq. 7 with each token's advantage A_i w_{i,t}; no KL term.

    Group-relative advantages (Eq. 1) and credit from the distribution (Eq. 2 to 6, `DistributionCredit`);
    the mean over responses of the mean over tokens.
    """
