"""Measures a credit report of many long responses: bytes, seconds to build, to open and to scroll.

    python tools/bench/report_size.py [--samples 2000] [--tokens 4000] [--max-mb 50]

The run is a made one (made_run.py). Opening is in headless Chromium, from the navigation to the list of
samples on the screen; scrolling goes through the whole list in a hundred jumps, and the longest time between
two frames is printed.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from made_run import make_run
from tqdm import tqdm

from megatron_dgpo.observe.report.build import build

SCROLL = """async () => {
  const box = document.getElementById("list");
  const frame = () => new Promise(requestAnimationFrame);
  let longest = 0, last = await frame();
  for (let i = 0; i <= 100; i++) {
    box.scrollTop = (box.scrollHeight - box.clientHeight) * i / 100;
    const now = await frame();
    longest = Math.max(longest, now - last);
    last = now;
  }
  return longest;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--max-mb", type=float, default=50.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, out = Path(folder, "run"), Path(folder, "report.html")
        make_run(run, steps=max(1, options.samples // 40), groups=4, group_size=10, tokens=options.tokens)
        began = time.perf_counter()
        with tqdm(desc="report", delay=1) as bar:
            report = build([run], out, max_bytes=int(options.max_mb * 1e6), progress=lambda *_: bar.update(1))
        seconds = time.perf_counter() - began
        print(f"built in {seconds:.1f} s: {report.samples} samples, {report.size / 1e6:.1f} MB")
        print(f"{report.precision.describe()}; bound on the weights' error {report.weight_error:.2g}")
        for name, steps in report.left_out.items():
            print(f"left out of {name}: {sum(steps.values())}")
        _browse(out)


def _browse(path: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for attempt in range(3):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            began = time.perf_counter()
            page.goto(f"{path.as_uri()}#samples", wait_until="commit")
            page.wait_for_selector("html[data-ready]", timeout=60_000)
            page.wait_for_selector(".row")
            opened = time.perf_counter() - began
            began = time.perf_counter()
            page.click(".row >> nth=3")
            page.wait_for_selector("#panes .tok")
            shown = time.perf_counter() - began
            longest = page.evaluate(SCROLL)
            print(
                f"{attempt + 1}: opened in {opened:.2f} s, a sample in {shown:.2f} s, "
                f"longest frame of scrolling {longest:.0f} ms"
            )
            page.close()
        print(f"{browser.browser_type.name} {browser.version}")
        browser.close()


if __name__ == "__main__":
    main()
