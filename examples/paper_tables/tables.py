"""The paper's tables at a laptop's scale: runs what is missing, then writes the tables (see run.sh)."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from arms import FULL, QUICK
from experiments import ROOT, Experiments


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps and seeds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--out", type=Path, help="folder of runs and tables")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    import report  # brings torch, scipy and matplotlib, which take seconds to import

    out = options.out or ROOT / "runs" / ("paper_tables-quick" if options.quick else "paper_tables")
    experiments = Experiments(out.resolve(), QUICK if options.quick else FULL, jobs=options.jobs)
    try:
        experiments.all()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report.write(experiments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
