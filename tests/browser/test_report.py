"""The credit report in a real browser: what it shows equals the credit log and the trainer's formula."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.made_run import VOCAB_SIZE, make_run, response
from reports import Made

from megatron_dgpo.algorithms.credit import credit_weights
from megatron_dgpo.observe import credit_log
from megatron_dgpo.observe.credit_log import CreditWriter
from megatron_dgpo.observe.report import html
from megatron_dgpo.observe.report.build import build

MAIN = "#panes .pane:not(.uniform) "
SETTINGS = ((0.003, 1.0, "log_vocab"), (1.5, 0.5, "none"), (0.02, 0.0, "log_vocab"))
Visit = Callable[..., Any]


def parse(text: str) -> float:
    return float(text.replace("\u2212", "-"))


def weights(row: dict[str, Any], tau: float, kappa: float, normalization: str) -> torch.Tensor:
    return credit_weights(
        torch.tensor(row["hellinger"]),
        torch.tensor(row["entropy"]),
        torch.tensor([0, len(row["entropy"])]),
        vocab_size=VOCAB_SIZE,
        tau=tau,
        kappa=kappa,
        entropy_normalization=normalization,
    ).weights


def tip(page: Any) -> dict[str, str]:
    return page.evaluate(
        "Object.fromEntries("
        "[...document.querySelectorAll('#tip dd')].map(d => [d.dataset.name, d.textContent]))"
    )


def test_hovering_shows_the_tokens_values(visit: Visit, dgpo: Made) -> None:
    row = list(credit_log.rows(dgpo.run))[7]
    page = visit(dgpo.report, "#sample-a7").page
    page.wait_for_selector(f"{MAIN}.tok")
    for i in (0, 5, int(np.argmax(row["weight"]))):
        page.hover(f"{MAIN}.tok[data-i='{i}']", force=True)
        shown = tip(page)
        assert page.text_content("#tip .tip-text") == row["token_text"][i]
        # Four digits of float32; log-probs and ratio are in half precision first (11 bits).
        for name, column, relative in (
            ("Weight", "weight", 2e-4),
            ("Squared Hellinger distance", "hellinger", 6e-4),
            ("Entropy, nats", "entropy", 6e-4),
            ("Normalised entropy", "entropy_normalized", 6e-4),
            ("Score", "score", 6e-4),
            ("Advantage", "token_advantage", 6e-4),
            ("Log-prob, trainer", "log_prob", 1.1e-3),
            ("Log-prob, engine", "engine_log_prob", 2e-3),
            ("Ratio", "ratio", 1.1e-3),
        ):
            assert parse(shown[name]) == pytest.approx(row[column][i], rel=relative, abs=1e-7), name
        assert shown["Clipped"] == ("yes" if row["clipped"][i] else "no")
        assert (shown["Token id"], shown["Weight version"]) == (
            str(row["token_id"][i]),
            str(row["version"][i]),
        )
        product = row["weight"][i] * row["token_advantage"][i]
        assert parse(shown["Advantage × weight"]) == pytest.approx(product, rel=6e-4)
    assert page.text_content(MAIN + ".tokens") == row["response"]
    page.hover("#panes .uniform .tok[data-i='3']", force=True)  # GRPO's beside it
    assert tip(page)["Weight"] == "1"


def test_tokens_by_keyboard_and_touch(visit: Visit, dgpo: Made) -> None:
    page = visit(dgpo.report, "#sample-a7", width=390, height=400, has_touch=True).page
    page.wait_for_selector(f"{MAIN}.tok")
    page.tap(f"{MAIN}.tok[data-i='4']")
    assert tip(page)["Position"].startswith("5 of ")
    page.keyboard.press("Escape")
    page.focus(MAIN + ".tokens")
    for key, place in (("Home", 1), ("ArrowRight", 2), ("ArrowDown", 12), ("ArrowLeft", 11)):
        page.keyboard.press(key)
        assert tip(page)["Position"].startswith(f"{place} of ")
    page.keyboard.press("End")  # scrolls
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    last = page.locator(MAIN + ".tok").count()
    assert page.is_visible("#tip") and tip(page)["Position"] == f"{last} of {last}"
    tops = page.eval_on_selector_all("#panes .tokens", "boxes => boxes.map(box => box.scrollTop)")
    assert tops[0] == pytest.approx(tops[1], abs=2) and tops[0] > 0  # GRPO's beside it goes along
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")


def test_sliders_give_the_trainers_weights(visit: Visit, dgpo: Made) -> None:
    rows = list(credit_log.rows(dgpo.run))
    row = rows[7]
    page = visit(dgpo.report, "#sample-a7").page
    page.wait_for_selector(f"{MAIN}.tok")
    trained = page.evaluate("Array.from(report.open().weights)")
    np.testing.assert_allclose(trained, row["weight"], rtol=1e-6)
    for tau, kappa, normalization in SETTINGS:
        page.fill("#tau", str(tau))
        page.fill("#kappa", str(kappa))
        page.select_option("#normalization", normalization)
        expected = weights(row, tau, kappa, normalization).double()
        np.testing.assert_allclose(page.evaluate("Array.from(report.open().weights)"), expected, rtol=1e-5)
        fraction = float(expected.sum() ** 2 / (len(expected) * expected.square().sum()))
        assert parse(page.text_content("#effective-chosen")[:-1]) == pytest.approx(100 * fraction, rel=6e-3)
        page.wait_for_selector("#all-chosen[data-settled=yes]")
        every = [weights(r, tau, kappa, normalization).double() for r in rows]
        mean = np.mean([float(w.sum() ** 2 / (len(w) * w.square().sum())) for w in every])
        assert parse(page.text_content("#all-chosen")[:-1]) == pytest.approx(100 * mean, rel=6e-3)
    page.evaluate("document.getElementById('tau-slider').value = -2")
    page.dispatch_event("#tau-slider", "input")
    assert page.input_value("#tau") == "0.01"
    page.click("#as-trained")
    assert page.evaluate("Array.from(report.open().weights)") == trained


def test_a_setting_out_of_range_changes_nothing(visit: Visit, dgpo: Made) -> None:
    page = visit(dgpo.report, "#sample-a7").page
    page.wait_for_selector(f"{MAIN}.tok")
    before = page.evaluate("Array.from(report.open().weights)")
    for field, value in (("tau", "0"), ("tau", ""), ("kappa", "-1")):
        page.fill(f"#{field}", value)
        assert page.get_attribute(f"#{field}", "aria-invalid") == "true"
        assert page.evaluate("Array.from(report.open().weights)") == before
        page.click("text=What if")
        page.fill(f"#{field}", "0.05" if field == "tau" else "1")


def test_steps_have_their_share_of_the_credit(visit: Visit, dgpo: Made) -> None:
    row = list(credit_log.rows(dgpo.run))[7]
    page = visit(dgpo.report, "#sample-a7").page
    page.wait_for_selector("#step-list li")
    page.check("input[name=steps][value=arithmetic]", force=True)
    shares = page.evaluate("[...document.querySelectorAll('.step-share')].map(e => Number(e.dataset.share))")
    # A step ends with its separators; a token counts where its first visible character stands.
    starts = [match.end() for match in re.finditer(r"[;\n]+", row["response"])]
    parts, place = dict[int, float](), 0
    for text, weight in zip(row["token_text"], row["weight"], strict=True):
        seen = place + (len(text) - len(text.lstrip()) if text.strip() else 0)
        step = sum(start <= seen for start in starts)
        parts[step] = parts.get(step, 0.0) + weight
        place += len(text)
    expected = np.array([parts[step] for step in sorted(parts)])
    assert len(shares) == len(expected) > 1
    np.testing.assert_allclose(shares, expected / expected.sum(), rtol=1e-6)


def test_filters_sorting_and_search(visit: Visit, dgpo: Made) -> None:
    rows = list(credit_log.rows(dgpo.run))
    page = visit(dgpo.report, "#samples").page

    def shown() -> list[int]:
        page.wait_for_selector("#count[data-settled=yes]")
        return page.evaluate("report.page.list.shown.map(item => item.n)")

    assert shown() == list(range(len(rows)))
    page.click("#filters summary")
    page.fill("#step-from", "20")
    page.fill("#step-to", "30")
    page.fill("#length-from", "100")
    wanted = [i for i, r in enumerate(rows) if 20 <= r["step"] <= 30 and len(r["token_id"]) >= 100]
    assert shown() == wanted != []
    page.select_option("#verdict", "wrong")
    assert shown() == [i for i in wanted if rows[i]["reward"] == 0] != wanted
    page.click("#clear")
    page.fill("#reward-from", "0.5")
    assert shown() == [i for i, r in enumerate(rows) if r["reward"] >= 0.5]
    page.click("#clear")
    w = [np.array(r["weight"]) for r in rows]
    fractions = [one.sum() ** 2 / (len(one) * np.square(one).sum()) for one in w]
    page.select_option("#sort", "concentrated")
    assert shown() == sorted(range(len(rows)), key=lambda i: fractions[i])
    page.select_option("#sort", "best")
    order = [(rows[i]["reward"], rows[i]["advantage"]) for i in shown()]
    assert order == sorted(order, reverse=True)
    page.select_option("#sort", "worst")
    order = [(rows[i]["reward"], rows[i]["advantage"]) for i in shown()]
    assert order == sorted(order)
    page.select_option("#sort", "step")
    deep = rows[9]["response"][-25:-3].upper()  # beyond what the list shows, and in another case
    assert len(rows[9]["response"]) > 250
    page.fill("#search", deep)
    assert shown() == [i for i, r in enumerate(rows) if deep.lower() in (r["prompt"] + r["response"]).lower()]
    page.fill("#search", "no such text 42 anywhere")
    assert shown() == [] and page.is_visible("#none-found")


def test_a_sample_that_cannot_be_read_is_counted_and_stops_nothing(visit: Visit, dgpo: Made) -> None:
    rows = list(credit_log.rows(dgpo.run))
    page = visit(dgpo.report, "#sample-a7").page
    page.wait_for_selector(f"{MAIN}.tok")
    page.evaluate("document.getElementById('a-9').remove()")
    deep = rows[10]["response"][-25:-3]
    page.fill("#search", deep)
    page.wait_for_selector("#count[data-settled=yes]:has-text('could not be read')")
    found = [i for i, r in enumerate(rows) if deep in r["response"] and i != 9]
    assert page.evaluate("report.page.list.shown.map(item => item.n)") == found != []
    assert page.text_content("#count") == f"{len(found)} of {len(rows)} samples, 1 could not be read"
    page.fill("#tau", "0.5")
    page.wait_for_selector("#all-chosen[data-settled=yes]:has-text('1 could not be read')")
    every = [weights(r, 0.5, 1.0, "log_vocab").double() for i, r in enumerate(rows) if i != 9]
    mean = np.mean([float(w.sum() ** 2 / (len(w) * w.square().sum())) for w in every])
    shown = page.text_content("#all-chosen").partition("%")[0]
    assert parse(shown) == pytest.approx(100 * mean, rel=6e-3)


def test_list_by_keyboard(visit: Visit, dgpo: Made) -> None:
    page = visit(dgpo.report, "#samples").page
    page.focus("#list")
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector(f"{MAIN}.tok")
    assert page.evaluate("report.open().n") == 1
    assert page.get_attribute("#row-1", "aria-selected") == "true"


def test_two_runs_side_by_side(visit: Visit, dgpo: Made, compared: Made) -> None:
    mine, theirs = list(credit_log.rows(dgpo.run)), list(credit_log.rows(compared.run))
    page = visit(compared.report).page
    chart = page.locator(".chart", has_text="Reward").first
    chart.locator(".line").first.wait_for(state="attached")  # a chart is drawn when it comes into view
    assert chart.locator(".line.run-a path").count() == chart.locator(".line.run-b path").count() == 1
    chart.locator("svg").focus()
    page.keyboard.press("Home")
    assert chart.locator(".chart-step").text_content() == "step 1"
    assert chart.locator(".value").count() == 2
    page.goto(compared.report.as_uri() + "#sample-a7")
    page.wait_for_selector("#panes.two")
    texts = page.eval_on_selector_all("#panes .tokens", "found => found.map(e => e.textContent)")
    assert texts[0] == mine[7]["response"]
    other = next(r for r in theirs if r["response"] == texts[1])
    assert other["prompt"] == mine[7]["prompt"] and other["step"] == mine[7]["step"]
    titles = page.eval_on_selector_all(".pane-title", "found => found.map(e => e.textContent)")
    assert titles == [f"dgpo, step {mine[7]['step']}", f"grpo, step {mine[7]['step']}"]
    page.click("#to-samples")
    page.click("#filters summary")
    page.select_option("#which-run", "b")
    assert page.evaluate("report.page.list.shown.length") == len(theirs)


def test_a_run_without_distances_says_so(visit: Visit, compared: Made) -> None:
    page = visit(compared.report, "#sample-b3").page
    page.wait_for_selector(f"{MAIN}.tok")
    assert page.is_hidden("#what-if") and "the same credit" in page.text_content("#no-what-if")
    assert set(page.evaluate("Array.from(report.open().weights)")) == {1}


HOSTILE = [
    "<script>window.ran = 1; alert(1)</script>",
    "</script><img src=x onerror='window.ran=1'>",
    "<!--<script>",
    "\u202eright to left\u202c",
    "\u2066isolated\u2069\u200f",
    " \U0001f469\u200d\U0001f469\u200d\U0001f467 e\u0301 \U0001f9ee",
    "\x00nul\x1b[31m",
    "\u2028line\u2029paragraph",
    "&lt;b&gt; &amp; \"quoted\" 'single' `tick`",
    "x" * 100_000,
    "javascript:alert(1)",
    "]]>",
    "\ufffd\ufeff",
    "<style>*{display:none}</style>",
    "\u05de\u05ea\u05de\u05d8 \u0663 + \u0664",
]


def test_hostile_text_is_shown_and_not_run(visit: Visit, tmp_path: Path) -> None:
    run = tmp_path / "<script>window.ran=1<"  # the run's name as well
    settings = {"step": 1, "algorithm": "<img src=x onerror=alert(1)>", "credit": "distribution", "tau": 0.05,
                "kappa": 1.0, "entropy_normalization": "log_vocab", "distance": "hellinger",
                "vocab_size": VOCAB_SIZE}  # fmt: skip
    text = "".join(HOSTILE)
    numbers = response(np.random.default_rng(1), list(range(len(HOSTILE))), settings)
    row = {
        "index": 0, "prompt_id": HOSTILE[0], "prompt": text, "prompt_tokens": 5, "answer": HOSTILE[1],
        "extracted": HOSTILE[3], "finish_reason": HOSTILE[0], "reward": 1.0,
        "reward_parts": {HOSTILE[1]: 1.0},
        "response": text, "advantage": 0.5, "token_advantage": [0.5] * len(HOSTILE), **numbers,
    }  # fmt: skip
    writer = CreditWriter(run, replica=0, pieces=lambda ids: [HOSTILE[i] for i in ids], max_bytes=None)
    writer.put(1, settings, lambda: [row])
    writer.close()
    (run / "advisories.jsonl").write_text(
        '{"step": 1, "name": "<script>", "message": "</script><b>", "suggestion": "<!--"}\n'
    )
    build([run], tmp_path / "report.html", max_bytes=50_000_000)
    page = visit(tmp_path / "report.html", "#sample-a0").page
    page.wait_for_selector(f"{MAIN}.tok")
    assert page.text_content(MAIN + ".tokens") == text
    assert page.text_content("#prompt") == text
    assert page.text_content("#title") == run.name and run.name in page.title()
    assert page.locator(f"{MAIN} .mark[data-mark='RLO']").count() == 1
    assert page.locator(f"{MAIN} .mark[data-mark='x00']").count() == 1
    assert page.evaluate("getComputedStyle(document.querySelector('.tok')).unicodeBidi") == "isolate"
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    page.hover(f"{MAIN}.tok[data-i='3']", force=True)
    assert page.text_content("#tip .tip-text") == HOSTILE[3]
    assert page.evaluate("window.ran") is None
    assert page.locator("img, #content script, #content style").count() == 0


def test_the_policy_refuses_a_script_that_was_put_in(browser: Any, dgpo: Made) -> None:
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(dgpo.report.as_uri())
    page.wait_for_selector("html[data-ready]")
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'ran = 1'}))"
    )
    assert page.evaluate("typeof ran") == "undefined"
    assert page.evaluate("fetch('https://example.org').catch(() => 'refused')") == "refused"
    assert any("Content Security Policy" in message for message in said)
    page.close()


def test_a_long_list_keeps_few_rows_and_a_small_file_says_what_it_lost(visit: Visit, tmp_path: Path) -> None:
    make_run(tmp_path / "run", steps=10, groups=3, group_size=10, tokens=200)
    exact = build([tmp_path / "run"], tmp_path / "exact.html", max_bytes=50_000_000)
    small = build([tmp_path / "run"], tmp_path / "small.html", max_bytes=int(exact.size * 0.45))
    assert small.size <= exact.size * 0.45 and small.samples == exact.samples == 300
    assert exact.weight_error == 0 and 0 < small.weight_error < 0.05
    page = visit(tmp_path / "small.html", "#samples").page
    page.wait_for_selector(".row")
    assert page.locator(".row").count() < 40
    page.evaluate("document.getElementById('list').scrollTop = 1e9")
    page.wait_for_selector("[aria-posinset='300']")
    assert page.locator(".row").count() < 40
    page.click("[aria-posinset='300']")
    page.wait_for_selector(f"{MAIN}.tok")
    assert "off by at most" in page.text_content("#bound")
    row = list(credit_log.rows(tmp_path / "run"))[299]
    shown = np.array(page.evaluate("Array.from(report.open().weights)"))
    worst = np.abs(shown / np.array(row["weight"]) - 1).max()
    assert 1e-7 < worst <= small.weight_error


@pytest.mark.parametrize("width", (390, 1440))
def test_nothing_is_wider_than_the_screen(visit: Visit, compared: Made, width: int) -> None:
    page = visit(compared.report, width=width).page
    for place in ("#curves", "#samples", "#sample-a7"):
        page.goto(compared.report.as_uri() + place)
        page.wait_for_selector("html[data-ready]")
        if "sample-" in place:
            page.wait_for_selector(f"{MAIN}.tok")
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), place


def test_numbers_that_differ_by_rounding_alone_have_a_chart(visit: Visit, tmp_path: Path) -> None:
    """Ticks between neighbouring floats would never come to an end."""
    rates = [0.01, math.nextafter(0.01, 1)] * 3
    rows = [{"step": n, "phase": "train", "learning_rate": rate} for n, rate in enumerate(rates)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build([tmp_path], tmp_path / "report.html", max_bytes=1_000_000)
    page = visit(tmp_path / "report.html").page
    assert "Learning rate" in page.text_content("body") and "0.01" in page.text_content("body")
    assert page.locator("svg text").count() < 40


ASSETS = Path(html.__file__).parent / "assets"
RANGES = [
    (0.991, 0.9999), (0.9999999, 1.0), (1 - 2e-9, 1 + 2e-9), (-0.5, -0.4999), (-3.0, 5.0), (0.0, 1.0),
    (0.0, 1e-4), (0.0, 3e-12), (1e-300, 9e-300), (1e-7, 1.01e-7), (1e6, 1e6 + 4), (123456.0, 123459.0),
    (2e9, 9e9), (1e12, 1.00000001e12), (-1e300, 1e300), (1.5e308, 1.7e308), (0.0, 0.3), (1e-3, 1.2e-3),
    (99.5, 100.5), (-1e-5, 2e-5), (40000.0, 90000.0),
]  # fmt: skip
"""(low, high) of values."""
LABELS = """ranges => ranges.map(([low, high]) => {
  const scale = makeScale(low, high, 0, 100, false, 4);
  return [scale.ticks, tickLabels(scale.ticks)];
})"""
KNOWN = {
    "[0, 0.5, 1]": ["0", "0.5", "1"],
    "[0.992, 0.994, 0.996]": ["0.992", "0.994", "0.996"],
    "[-0.5, -0.49995]": ["−0.5", "−0.49995"],
    "[0, 2e9, 4e9]": ["0", "2e9", "4e9"],
    "[1000000, 1000002]": ["1000000", "1000002"],
    "[-0.00002, 0, 0.00002]": ["−0.00002", "0", "0.00002"],
    "[1e-7, 1.005e-7]": ["1e−7", "1.005e−7"],
    "[0.00001, 0.001, 0.1]": ["0.00001", "0.001", "0.1"],
    "[1e-8, 1e-6, 0.01]": ["1e−8", "1e−6", "1e−2"],
    "[0.1, 0.2, 0.30000000000000004]": ["0.1", "0.2", "0.3"],
    "[0]": ["0"],
}


def test_labels_of_ticks_can_be_told_apart(browser: Any) -> None:
    """Nearly equal values, tiny, huge and negative ranges: each label is right and another one."""
    page = browser.new_page()
    for name in ("dom.js", "charts.js"):
        page.add_script_tag(path=ASSETS / name)
    for ticks, wanted in KNOWN.items():
        assert page.evaluate(f"tickLabels({ticks})") == wanted, ticks
    for (low, high), (ticks, labels) in zip(RANGES, page.evaluate(LABELS, RANGES), strict=True):
        step = min(b - a for a, b in zip(ticks, ticks[1:], strict=False))
        assert len(ticks) > 1, (low, high)
        assert len(set(labels)) == len(ticks), (low, high, labels)
        for tick, label in zip(ticks, labels, strict=True):
            assert abs(parse(label) - tick) <= 1e-3 * step, (low, high, labels)
        most = 7 if 1e-4 <= max(abs(low), abs(high)) < 1e6 and high - low > 0.01 * abs(high) else 18
        assert max(map(len, labels)) <= most, (low, high, labels)
    page.close()


def test_axes_of_charts(visit: Visit, tmp_path: Path) -> None:
    """Values within a percent of each other, constants, logarithms: no two ticks have the same label."""
    series = {
        "reward": [0.991, 0.9999, 0.9951],
        "credit_effective_fraction": [0.99999998, 0.99999999, 0.99999998],
        "credit_weight_max": [1.0, 1.0, 1.0],
        "log_prob_gap": [0.011, 0.6, 0.1],
        "hellinger_p50": [1e-9, 1e-4, 3e-2],
        "clip_fraction": [0.0, 0.0, 0.0],
        "response_length": [-2.0, 3.0, 1.0],
        "memory/peak_rss_bytes": [2e9, 9e9, 3e9],
    }
    rows = [{"step": n, "phase": "train", **{k: v[n] for k, v in series.items()}} for n in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build([tmp_path], tmp_path / "report.html", max_bytes=1_000_000)
    page = visit(tmp_path / "report.html", height=4000).page
    page.wait_for_function("document.querySelectorAll('svg.plot text.tick').length > 30")
    charts = page.eval_on_selector_all(
        "svg.plot",
        "plots => plots.map(p => [...p.querySelectorAll('text.tick[text-anchor=end]')]"
        ".map(t => [t.textContent, t.getBBox().x]))",
    )
    assert len(charts) == len(series)
    for ticks in charts:
        assert len({text for text, _ in ticks}) == len(ticks) >= 2, ticks
        assert min(x for _, x in ticks) >= 0, ticks


def test_runs_without_steps_or_samples(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    build([tmp_path], tmp_path / "report.html", max_bytes=1_000_000)
    page = visit(tmp_path / "report.html").page
    assert page.is_visible("#no-metrics")
    page.click("#to-samples")
    assert "observe.credit_every" in page.text_content("#no-samples") and page.is_visible("#no-samples")
    make_run(tmp_path / "one", steps=1, groups=1, group_size=1, tokens=1)
    build([tmp_path / "one"], tmp_path / "one.html", max_bytes=1_000_000)
    page = visit(tmp_path / "one.html", "#sample-a0").page
    page.wait_for_selector(f"{MAIN}.tok")
    assert page.text_content("#count") == "1 sample" and page.text_content("#effective-trained") == "100%"
