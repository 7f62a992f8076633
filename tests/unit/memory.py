"""What a call allocates on the CPU, by the allocator's own record: for tests."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile


class Memory(NamedTuple):
    """Bytes."""

    peak: int
    """Most that lived at a time of what the call allocated, temporaries inside operators among it."""
    kept: int
    """What still lives when it returns."""
    largest: int
    """The largest single tensor's."""


def measured(call: Callable[[], Any]) -> tuple[Any, Memory]:
    """(what call returns, what it allocated): of torch's tensors, not of numpy or Python."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        record.export_chrome_trace(file.name)
        with open(file.name) as text:
            events = json.load(text)["traceEvents"]
    steps = [e["args"] for e in sorted(events, key=lambda e: e.get("ts", 0)) if e.get("name") == "[memory]"]
    before = steps[0]["Total Allocated"] - steps[0]["Bytes"]
    return result, Memory(
        peak=max(step["Total Allocated"] for step in steps) - before,
        kept=sum(step["Bytes"] for step in steps),
        largest=max(step["Bytes"] for step in steps),
    )
