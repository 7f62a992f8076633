"""The inspector in a real browser: from the list to a sample, and a run that goes on meanwhile."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from inspecting import Server, append, inspector, metrics_row, response, write_credit, write_run
from patience import patience, until

from megatron_dgpo.observe import jsonl

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

HOSTILE = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\"> \u202e txt 🙂"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspected") / "runs"
    write_run(root / "quickstart/seed1/dgpo", steps=8, wanted=8, credit=(1, 4, 8))
    write_run(root / "quickstart/seed1/grpo", steps=8, wanted=8, credit=(1,))
    return root


@pytest.fixture(scope="module")
def server(browser: Any, root: Path) -> Iterator[Server]:
    with inspector(root) as server:
        yield server
        assert server.end() == (0, "")


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """Opens one of the server's pages, and checks at the end that no page complained or asked elsewhere."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def _complaint(message: Any, but: str) -> None:
        if message.type in ("error", "warning") and but not in message.text:
            wrong.append(message.text)

    def go(path: str, *, width: int = 1280, height: int = 700, but: str = "never", **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(1000 * patience())
        page = context.new_page()
        page.on("request", lambda r: None if r.url.startswith((server.url, "data:")) else wrong.append(r.url))
        page.on("console", lambda m: _complaint(m, but))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.goto(server.url.rstrip("/") + path)
        page.wait_for_selector("html[data-ready]")
        return page

    yield go
    for context in contexts:
        context.close()
    assert wrong == []


def text(page: Any, selector: str) -> str:
    return re.sub(r"\s+", " ", page.text_content(selector) or "").strip()


def wait(page: Any, script: str) -> None:
    """Until the script is true. playwright's own wait evaluates strings, which the page's policy forbids."""

    def now() -> bool:
        try:
            return bool(page.evaluate(script))
        except playwright.Error:  # between two pages
            return False

    until(now, script)


def test_from_the_list_to_a_sample_and_back(visit: Callable[..., Any], server: Server) -> None:
    page = visit("/")
    row = page.locator("#runs tr", has_text="quickstart/seed1/dgpo")
    cells = [re.sub(r"\s+", " ", cell).strip() for cell in row.locator("td, th").all_text_contents()]
    assert cells[1:6] == ["quickstart/seed1/dgpo", "finished", "8 / 8", "0.832", "avg@8 0.58"]
    page.fill("#filter", "grpo")
    wait(page, "document.querySelectorAll('#runs tr').length === 1")
    page.fill("#filter", "")
    row.locator("a").click()
    page.wait_for_selector("html[data-ready] #live-dot[data-state='finished']")
    assert text(page, "#title") == "quickstart/seed1/dgpo" and page.title() == "quickstart/seed1/dgpo"
    assert text(page, "#live-text") == "finished · step 8 of 8"
    page.click("#to-samples")
    page.locator("#list .row").nth(2).click()
    page.wait_for_selector("#panes .tok")
    pieces = page.evaluate("window.report.open().texts")
    wanted = response(1, 2)
    assert pieces == wanted["token_text"]
    got = page.evaluate("[...window.report.open().weights]")
    assert got == pytest.approx(wanted["weight"], rel=1e-5)
    page.click("text=All runs")
    page.wait_for_selector("#runs tr")


def test_two_runs_beside_each_other(visit: Callable[..., Any]) -> None:
    page = visit("/")
    for name in ("dgpo", "grpo"):
        page.locator("#runs tr", has_text=f"seed1/{name}").locator("input").check()
    page.click("#compare")
    page.wait_for_selector("html[data-ready] #live-dot[data-state='finished']")
    assert text(page, "#title") == "A quickstart/seed1/dgpo and B quickstart/seed1/grpo"
    page.click("#to-samples")
    wait(page, "document.querySelector('#count').textContent === '16 samples'")


def test_a_run_is_followed_without_a_reload(visit: Callable[..., Any], root: Path) -> None:
    run = write_run(root / "under-way", steps=3, wanted=90, credit=(1, 2, 3))
    for step in (1, 2, 3):
        write_credit(run, step, [response(step, index) for index in range(8)])
    page = visit("/run?run=under-way")
    page.evaluate("window.stays = true")
    page.wait_for_selector("#live-dot[data-state='running']")
    chart = page.locator("figure.chart", has_text="Reward").first
    chart.locator("svg .line path").wait_for()
    path = chart.locator("svg .line path").first.get_attribute("d")
    page.evaluate("scrollTo(0, 150)")
    page.evaluate("window.chart = document.querySelector('figure.chart')")

    # A line that is written in two pieces, and an advisory.
    line = jsonl.dump(metrics_row(4) | {"reward": 0.987})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line[:40])
    append(
        run / "advisories.jsonl", {"step": 3, "name": "uniform_credit", "message": HOSTILE, "suggestion": "s"}
    )
    page.wait_for_selector("#advisory-list li")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line[40:])
    wait(page, "document.querySelector('figure.chart').textContent.includes('0.987')")
    assert chart.locator("svg .line path").first.get_attribute("d") != path
    assert text(page, "#live-text") == "running · step 4 of 90"
    assert page.evaluate("[scrollY, document.querySelector('figure.chart') === window.chart]") == [150, True]
    assert "<script>" in text(page, "#advisory-list") and page.title() == "under-way"

    # Rows that come twice, as those written while the page was being made do.
    page.evaluate("window.report.page.runs[0].source.cursors.metrics = '0-00000000'")
    append(run / "metrics.jsonl", metrics_row(5) | {"reward": 0.345})
    wait(page, "document.querySelector('figure.chart').textContent.includes('0.345')")
    assert page.evaluate("window.report.page.runs[0].overview.metrics.train.step") == [1, 2, 3, 4, 5]

    # A sample is open, the list is scrolled and filtered, and files come, go and are damaged.
    page.click("#to-samples")
    wait(page, "document.querySelector('#count').textContent === '24 samples'")
    page.select_option("#sort", "newest")
    page.evaluate("document.querySelector('#list').scrollTop = 500")
    page.locator("#list .row", has_text="step 2").last.click()
    page.wait_for_selector("#panes .tok")
    opened = page.evaluate(
        "({key: window.report.open().key, top: document.querySelector('#list').scrollTop})"
    )
    page.evaluate("window.pane = document.querySelector('#panes').firstElementChild")
    top_row = "[...document.querySelectorAll('#list .row')].find(r => r.getBoundingClientRect().bottom > " \
        "document.querySelector('#list').getBoundingClientRect().top + 1).textContent"  # fmt: skip
    before = page.evaluate(top_row)
    write_credit(run, 4, [response(4, index, f"{HOSTILE} {index}") for index in range(3)])
    wait(page, "document.querySelector('#count').textContent === '27 samples'")
    after = page.evaluate("({key: window.report.open().key, top: document.querySelector('#list').scrollTop})")
    assert after["key"] == opened["key"] and page.evaluate(top_row) == before
    assert after["top"] - opened["top"] == 3 * 68
    assert page.evaluate("document.querySelector('#panes').firstElementChild === window.pane")

    (run / "credit/step_000001-replica0.parquet").unlink()  # the log is thinned out
    whole = write_credit(run, 5, replica=1).read_bytes()
    (run / "credit/step_000005-replica0.parquet").write_bytes(whole[: len(whole) // 2])
    wait(page, "document.querySelector('#count').textContent === '23 samples'")
    page.click("#to-curves")
    wait(page, "document.querySelector('#notes').textContent.includes('step_000005-replica0.parquet')")
    (run / "credit/step_000005-replica0.parquet").write_bytes(whole)
    page.click("#to-samples")
    wait(page, "document.querySelector('#count').textContent === '27 samples'")
    wait(page, "document.querySelector('#notes').hidden")
    page.fill("#search", "onerror")
    wait(page, "document.querySelector('#count').textContent === '3 of 27 samples'")
    page.locator("#list .row").first.click()
    wait(page, "window.report.open().texts.join('').includes('<script>')")
    assert page.evaluate("window.stays") and page.title() == "under-way"


def test_a_run_that_is_deleted_is_said_to_be(visit: Callable[..., Any], root: Path) -> None:
    run = write_run(root / "deleted", steps=6, wanted=90, credit=(1,))
    page = visit("/run?run=deleted", but="404 (Not Found)")  # a browser says so of any such answer
    shutil.rmtree(run)
    wait(page, "document.querySelector('#live-text').textContent === 'this run is no longer there'")


def test_a_run_that_is_resumed_from_an_earlier_step_is_shown_as_it_is_now(
    visit: Callable[..., Any], root: Path
) -> None:
    run = write_run(root / "resumed", steps=6, wanted=90, credit=(1, 4))
    page = visit("/run?run=resumed")
    page.wait_for_selector("#live-text:has-text('step 6 of 90')")
    page.evaluate("window.stays = true")
    jsonl.write(run / "metrics.jsonl", [metrics_row(step) for step in (1, 2)])
    (run / "credit/step_000004-replica0.parquet").unlink()
    page.wait_for_selector("#live-text:has-text('step 2 of 90')")
    wait(page, "window.stays === undefined && document.documentElement.dataset.ready === 'yes'")
    page.click("#to-samples")
    wait(page, "document.querySelector('#count').textContent === '4 samples'")


def test_new_runs_appear_in_the_list(visit: Callable[..., Any], root: Path) -> None:
    page = visit("/")
    write_run(root / "new <b>run</b>", steps=1, wanted=5, credit=())
    row = page.locator("#runs tr", has_text="new <b>run</b>")
    row.wait_for()
    row.locator("a").click()
    page.wait_for_selector("html[data-ready] #live-dot[data-state='running']")
    assert text(page, "#title") == "new <b>run</b>"
    page.click("#to-samples")
    page.locator("#no-samples").wait_for()
    write_credit(root / "new <b>run</b>", 1)  # its first samples come
    wait(page, "document.querySelector('#count').textContent === '4 samples'")
    assert page.locator("#list .row").count() == 4
