"""The report of a run that was really trained: the quick start's recipe from random weights, three steps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import credit_report
import numpy as np
import pytest
import torch
from launch import Launch
from patience import patience
from place import EXAMPLES, Place

from megatron_dgpo.algorithms.credit import credit_weights
from megatron_dgpo.observe import credit_log


@pytest.fixture(scope="module")
def run(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = Place(tmp_path_factory.mktemp("quickstart"))
    size = ("--traces", "70", "--train-prompts", "40", "--heldout-prompts", "10")
    command = [sys.executable, str(EXAMPLES / "make_data.py"), "--out", str(place.data), *size]
    subprocess.run(command, check=True, timeout=patience())
    (place.data / "model").rename(place.model)
    words = place.words("train", "--train.steps", 3, "--train.prompts_per_step", 4, "--optimizer.lr", 0.01)
    words += ["--train.prompts_per_minibatch", "4", "--observe.credit_every", "1", "--algorithm.tau", "0.02"]
    # Random weights answer nothing right: shorter responses are worth more, to have something to learn.
    words += ["--reward.terms", '[{name = "length", weight = 1.0, free_tokens = 4, max_tokens = 96}]']
    Launch("megatron_dgpo.train", 1, words, place.folder / "log").succeed()
    assert credit_report.main([str(place.folder / "run")]) == 0
    return place.folder / "run"


def test_its_report_agrees_with_its_log(run: Path, visit: Callable[..., Any]) -> None:
    rows, settings = [], {}
    for path in credit_log.files(run):
        settings = credit_log.settings(credit_log.read(path))
        rows += credit_log.read(path).to_pylist()
    number = max(range(len(rows)), key=lambda n: max(rows[n]["weight"]))
    row = rows[number]
    assert max(row["weight"]) > 1.01  # it has moved from the reference
    page = visit(run / "credit_report.html", f"#sample-a{number}").page
    page.wait_for_selector("#panes .pane:not(.uniform) .tok")
    assert page.text_content("#panes .pane:not(.uniform) .tokens") == "".join(row["token_text"])
    np.testing.assert_allclose(page.evaluate("Array.from(report.open().weights)"), row["weight"], rtol=1e-6)
    for tau, kappa, normalization in ((0.001, 1.0, "log_vocab"), (1.0, 0.0, "log_vocab"), (0.1, 0.5, "none")):
        page.fill("#tau", str(tau))
        page.fill("#kappa", str(kappa))
        page.select_option("#normalization", normalization)
        expected = credit_weights(
            torch.tensor(row["hellinger"]),
            torch.tensor(row["entropy"]),
            torch.tensor([0, len(row["entropy"])]),
            vocab_size=settings["vocab_size"],
            tau=tau,
            kappa=kappa,
            entropy_normalization=normalization,
        ).weights
        np.testing.assert_allclose(page.evaluate("Array.from(report.open().weights)"), expected, rtol=1e-5)
    page.click("#to-curves")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [m for m in metrics if m["phase"] == "train"][-1]
    chart = page.locator(".chart", has_text="Mean entropy").first
    shown = chart.locator(".value").text_content()
    assert math.isclose(float(shown), last["entropy"], rel_tol=1e-3)
