"""What the fixtures give to tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Made:
    """A run's folder and a report of it."""

    run: Path
    report: Path
