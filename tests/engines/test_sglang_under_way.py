"""New weights while a real SGLang server draws: which weights drew which token of a sample.

The test changes the weights of a server of the session, so it comes after those of test_sglang_sync.py.
"""

from __future__ import annotations

from pathlib import Path

import flight_ranks
from spawn import run_ranks

from megatron_dgpo.rollout.sglang.servers import ServerProcess


def test_every_token_has_the_log_prob_of_the_weights_that_it_names(
    folders: dict[str, Path], servers: dict[str, ServerProcess]
) -> None:
    given = folders["qwen3"], servers["qwen3"].url, ("retract", "abort")
    ranks = run_ranks(flight_ranks.sync_while_drawing, 2, *given)
    for seen in ranks:
        for way, samples in seen.items():
            assert samples["complete"] and len(samples["spans"]) == 8 * flight_ranks.SAMPLES, way
            assert samples["difference"] <= 1e-4, (way, samples["difference"])
        assert set(seen["abort"]["spans"]) == {1}  # what was half done began again
    for way in ("retract", "abort"):
        assert max(seen[way]["waiting"] for seen in ranks) > 0, way
        assert {v for seen in ranks for v in seen[way]["versions"]} == {1, 2}, way
    # What was half done went on under the new weights. A rank that waits for the other's sync may have all
    # of its samples by then; the one that comes last has not.
    assert max(max(seen["retract"]["spans"]) for seen in ranks) == 2
