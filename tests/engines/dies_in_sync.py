"""`torchrun -m dies_in_sync CONFIG.toml ...`: a training run in whose first start one rank is killed while
servers wait for its part of the weights of version 1. DIES is that rank; NOTE gets a file at that moment."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dgpo import train
from megatron_dgpo.rollout.sglang.transport import Broadcast
from megatron_dgpo.types import WeightBucket


def _die_at_version_1() -> None:
    post = Broadcast.post_bucket

    def post_and_die(
        self: Broadcast, path: str, payloads: Mapping[str, dict[str, Any]], bucket: WeightBucket
    ) -> None:
        post(self, path, payloads, bucket)
        if next(iter(payloads.values()))["weight_version"] == "1":
            time.sleep(1.0)  # the servers take the request, and wait
            Path(os.environ["NOTE"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    Broadcast.post_bucket = post_and_die  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ["RANK"] == os.environ["DIES"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        _die_at_version_1()
    train.main()
