"""PPO (arXiv 1707.06347) with a value model."""

from __future__ import annotations

from megatron_dgpo.algorithms.base import Algorithm


class Ppo(Algorithm):
    """The clipped surrogate with each token's advantage from a value model (GAE); no groups.

    What `advantages` sets is the response's reward; the critic makes token advantages of it
    (batch.features["advantages"]) before the first update.
    """

    needs_critic = True

    def advantages(self, rewards: list[list[float | None]]) -> list[list[float | None]]:
        return rewards
