"""A headless Chromium (Debian's, through playwright) and reports to open in it; these tests skip without."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from bench.made_run import make_run
from patience import patience
from reports import Made

from megatron_dgpo.observe.report.build import build


@pytest.fixture(scope="module")  # not longer: while it is open, its event loop is the only one of this thread
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"], timeout=1000 * patience()
        )
        yield started
        started.close()


@dataclass
class Opened:
    """A page, and everything that it should not have done."""

    page: Any
    wrong: list[str] = field(default_factory=list)


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Opened]]:
    """Opens a report from disk, and checks at the end that nothing asked the network or complained."""
    opened: list[Opened] = []

    def go(path: Path, place: str = "", *, width: int = 1440, height: int = 900, **options: Any) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(1000 * patience())
        one = Opened(context.new_page())
        opened.append(one)
        one.page.on("request", lambda r: _request(one, r.url))
        one.page.on("console", lambda m: one.wrong.append(m.text) if m.type in ("error", "warning") else None)
        one.page.on("pageerror", lambda error: one.wrong.append(str(error)))
        one.page.on("dialog", lambda dialog: (one.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        one.page.goto(path.as_uri() + place)
        one.page.wait_for_selector("html[data-ready]")
        return one

    yield go
    for one in opened:
        one.page.context.close()
    assert [wrong for one in opened for wrong in one.wrong] == []


def _request(opened: Opened, url: str) -> None:
    if not url.startswith(("file:", "data:")):
        opened.wrong.append(f"asked for {url}")


@pytest.fixture(scope="session")
def dgpo(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("dgpo")
    make_run(folder / "dgpo", steps=4, group_size=6, tokens=(60, 160), tau=0.05)
    build([folder / "dgpo"], folder / "report.html", max_bytes=50_000_000)
    return Made(folder / "dgpo", folder / "report.html")


@pytest.fixture(scope="session")
def compared(dgpo: Made) -> Made:
    """`dgpo` with a GRPO run on the same prompts beside it."""
    other = dgpo.run.parent / "grpo"
    make_run(other, steps=4, group_size=6, tokens=(60, 160), credit=False, seed=2)
    build([dgpo.run, other], dgpo.run.parent / "compared.html", max_bytes=50_000_000)
    return Made(other, dgpo.run.parent / "compared.html")
