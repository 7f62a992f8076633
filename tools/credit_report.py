"""Writes where a run's credit went as one HTML file, which opens from disk and asks no network for anything.

    python tools/credit_report.py RUN [--compare RUN2] [--out FILE] [--max-mb 50]

In it: the training curves and advisories; every recorded response as a map of its tokens' weights, distances,
entropies or advantages, beside GRPO's uniform credit; the credit of sentences and steps of arithmetic; and
sliders for what another tau, kappa or entropy normalisation would have done. With --compare, a second run's
curves over the first one's, and its responses to the same prompt beside them.

Distance and entropy are kept in float32 where the file stays below --max-mb; else in fixed point, and the
bound on the weights' error that this brings is printed and shown. If even that is too large, groups are left
out, and how many of which steps is said. The status is 2 where the command is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_dgpo.observe import credit_log
from megatron_dgpo.observe.report import build, data
from megatron_dgpo.progress import Bar, progress


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--compare", type=Path, metavar="RUN2", help="another run's folder")
    parser.add_argument("--out", type=Path, help="default: RUN/credit_report.html")
    parser.add_argument("--max-mb", type=float, default=50.0, help="size of the file in 10^6 bytes")
    options = parser.parse_args(argv)
    if not 0 < options.max_mb < 1e6:
        parser.error(f"--max-mb {options.max_mb:g}: more than 0")
    return options


class Bars:
    """Progress of each phase."""

    def __init__(self) -> None:
        self.name, self.done = "", 0
        self._open = ExitStack()
        self._bar: Bar | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.name or self._bar is None or done < self.done:
            self.close()
            self.name, self.done = what, 0
            self._bar = self._open.enter_context(progress(what, total, shown=True))
        self._bar.update(done - self.done)
        self.done = done

    def close(self) -> None:
        self._open.close()


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    runs = [options.run] if options.compare is None else [options.run, options.compare]
    out = options.out or options.run / "credit_report.html"
    bars = Bars()
    try:
        for run in runs:
            data.check_run(run)
        if not out.parent.is_dir():
            raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
        if not any(credit_log.files(run) for run in runs):
            raise ValueError(
                f"{options.run}: has no credit log ({credit_log.FOLDER}/step_*.parquet); the setting "
                "observe.credit_every says every how many steps a run writes one, 0 is never"
            )
        report = build.build(runs, out, max_bytes=int(options.max_mb * 1e6), progress=bars)
    except (OSError, ValueError) as error:
        bars.close()
        print(f"error: {error}", file=sys.stderr)
        return 2
    bars.close()
    say(report, runs)
    return 0


def say(report: build.Report, runs: Sequence[Path]) -> None:
    for warning in report.warnings:
        print(f"warning: left out: {warning}", file=sys.stderr)
    for name, steps in report.left_out.items():
        which = ", ".join(f"step {step}: {count}" for step, count in steps.items())
        total = sum(steps.values())
        print(f"warning: {total} samples of {name} did not fit (see --max-mb): {which}", file=sys.stderr)
    print(f"{report.path}: {report.samples:,} samples, {report.size / 1e6:.1f} MB")
    if report.samples:
        print(f"  {report.precision.describe()}")
    if report.weight_error:
        print(
            f"  rounded to fit: no weight is off by more than {100 * report.weight_error:.2g}% of itself\n"
            "  at its step's own settings; the page says it for those of the sliders"
        )


if __name__ == "__main__":
    sys.exit(main())
