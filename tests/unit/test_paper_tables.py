"""The statistics and the text of examples/paper_tables, from runs whose numbers are made here."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dgpo.checks import Absent, check_all
from megatron_dgpo.cli import compose, validate
from megatron_dgpo.config import Config

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "paper_tables"
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def parts() -> Any:
    """The example's modules: they import each other by name, as scripts of one folder do."""
    names = ("arms", "experiments", "results", "report")
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield {name: __import__(name) for name in names}
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in names:
            sys.modules.pop(name, None)


def test_every_arm_is_a_config_that_a_run_accepts(parts: Any) -> None:
    recipe = [str(path) for path in parts["experiments"].RECIPE]
    kinds = {}
    for name, words in parts["arms"].ARMS.items():
        raw, problems = compose([*recipe, *words], Config)
        assert not problems
        config = validate(raw, Config)
        found = [p for p in check_all(config, 1) if not isinstance(p, Absent)]
        assert [p.partition(":")[0] for p in found] == ["model.path"]  # the quick start makes it
        kinds[name] = config.algorithm.model_dump_json()
    assert len(set(kinds.values())) == len(kinds)  # no two arms are the same run


def test_an_interval_by_hand(parts: Any) -> None:
    """1, 2, 3, 6: mean 3, s = sqrt(14 / 3); t(.975, 3 degrees of freedom) = 3.182446."""
    found = parts["results"].estimate([1.0, 2.0, 3.0, 6.0])
    half = 3.182446 * math.sqrt(14 / 3) / 2
    assert found.mean == 3.0 and found.n == 4
    assert found.low == pytest.approx(3 - half, rel=1e-6) and found.high == pytest.approx(3 + half, rel=1e-6)
    equal = parts["results"].estimate([0.0, 0.0])
    assert (equal.low, equal.high, equal.p) == (0.0, 0.0, 1.0)
    alone = parts["results"].estimate([0.5])
    assert alone.mean == 0.5 and math.isnan(alone.low) and math.isnan(alone.p)


def test_holm_by_hand(parts: Any) -> None:
    """Four tests: .01 x 4, .02 x 3, then never less than the one before."""
    holm = parts["results"].holm
    assert holm([0.03, 0.01, 0.02, 0.9]) == pytest.approx([0.06, 0.04, 0.06, 0.9])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    nan = holm([0.01, float("nan")])
    assert nan[0] == 0.02 and math.isnan(nan[1])


@pytest.fixture(scope="module")
def written(parts: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str, dict[str, Any]]:
    """The report of a replication whose runs are made up: DGPO beats GRPO by .1 with every seed, DAPO by
    .1 or -.1, and tau = 0.1 is best on the tuning prompts only."""
    arms, experiments = parts["arms"], parts["experiments"]
    scale = arms.Scale(cold_starts=2, main_seeds=4, ablation_seeds=2, steps=2, timed_rounds=1, timed_steps=4)
    folder = tmp_path_factory.mktemp("tables")
    made = experiments.Experiments(folder, scale, jobs=1)
    for run in {*scale.first_runs(), *scale.tuned_runs("0.1")}:
        gain = {arms.DGPO: 0.1, arms.DAPO: 0.1 * (-1) ** run.seed}.get(run.arm, 0.0)
        write_run(made.run_folder(run), arms, run, 0.5 + gain + 0.01 * run.seed / 100 + noise(run))
    for arm in arms.TIMED:
        rows = [timed_row(step, 2.0 if arm == arms.PPO else 1.0) for step in range(1, 5)]
        write_rows(made.timed_folder(arm, 0), rows)
    text = parts["report"].write(made).read_text()
    return made, text, json.loads((folder / "results.json").read_text())


def noise(run: Any) -> float:
    return 0.002 * ((7 * run.seed + 5 * len(run.arm) + sum(map(ord, run.arm))) % 5)


def write_run(folder: Path, arms: Any, run: Any, score: float) -> None:
    tuning = 0.9 if run.arm == "tau=0.1" else 0.6
    rows: list[dict[str, Any]] = [{"phase": "eval", "step": 0, "avg@4": 0.3}]
    for step in (1, 2):
        row: dict[str, Any] = {"phase": "train", "step": step, "zero_variance_groups": 0.0}
        if run.arm == arms.DAPO:
            row["groups_drawn"] = 64.0
        if run.arm == arms.PPO:
            row["explained_variance"] = 0.1 * step
        rows += [row, {"phase": "eval", "step": step, "avg@4": tuning}]
    write_rows(folder, rows)
    experiments = sys.modules["experiments"]
    names = [experiments.REPORTING]
    if run.arm == arms.DAPO:
        names.append(experiments.EQUAL_SAMPLES)
        for step in (1, 2):
            (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    for name in names:
        for top_p in experiments.TOP_PS:  # what decides is at top-p 1
            value = score if top_p == 1.0 else 0.99
            scores = {f"{of}@32": value for of in ("avg", "cons", "pass")}
            experiments.score_file(folder, name, top_p).write_text(json.dumps(scores))


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def timed_row(step: int, seconds: float) -> dict[str, Any]:
    slow = 50.0 if step <= 2 else seconds  # the first steps are not the machine's pace
    names = ("time/generate", "time/prepare", "time/update", "time/step")
    return {
        "phase": "train",
        "step": step,
        **dict.fromkeys(names, slow),
        "tokens_per_second": 100 / slow,
        "memory/peak_rss_bytes": 2**20 * 64 * step,
    }


def table(text: str, after: str) -> dict[str, list[str]]:
    """The first table after a text, by row title."""
    lines = text[text.index(after) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows: dict[str, list[str]] = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0]] = cells[1:]
    return rows


def test_verdicts_follow_the_paired_tests(written: Any) -> None:
    _, text, _ = written
    rows = table(text, "## Tables 1 and 2")
    assert rows["DGPO, the paper's tau = 1"][7] == "better"
    assert rows["DGPO, the paper's tau = 1"][5].startswith("+0.099 [+0.09")
    assert rows["DAPO, as many steps"][7] == "tie"
    assert rows["DGPO, tau = 0.1 (tuned)"][7] in ("tie", "worse")
    assert "DAPO, as many samples (1.00 x)" in rows
    claims = table(text, "## What replicates")
    assert claims["DGPO is better than GRPO"][-1] == "yes"
    assert claims["DAPO is better than GRPO, after as many steps"][-1] == "not told apart"
    assert rows["GRPO"][5:8] == ["", "", ""] and rows["GRPO"][1:4] == ["0.990"] * 3
    assert "DAPO drew 2.00 times" in text


def test_tau_is_tuned_on_the_tuning_prompts(written: Any) -> None:
    made, text, record = written
    assert made.tuned_tau() == record["tuned_tau"] == "0.1"
    assert "The best on the tuning prompts is tau = 0.1" in text


def test_every_table_has_its_rows(written: Any) -> None:
    _, text, record = written
    assert [int(n) for n in re.findall(r"## Tables? (\d)", text)] == [1, 3, 4, 5, 6]
    assert set(table(text, "## Table 4")) >= {"GRPO", *(f"tau = {t}" for t in ("0.02", "0.05", "0.1", "1.0"))}
    assert set(table(text, "## Table 5")) >= {f"kappa = {k}" for k in ("0.0", "1.0", "2.0")}
    rows = table(text, "## Table 6")
    assert rows["PPO"][:2] == ["50", "2.00 (2.00 to 2.00)"] and rows["GRPO"][-1] == "256"
    assert table(text, "PPO's critic")["explained variance"][0].startswith("0.100")
    assert len(record["outcomes"]) == 4 * 3 + 4 + 4 + 2 * 14  # main, equal samples, tuned, ablations


def test_equal_samples_are_no_more_than_the_others_have(parts: Any, written: Any, tmp_path: Path) -> None:
    made, _, _ = written
    step_at, dapo = parts["experiments"].step_at, parts["arms"].Run(parts["arms"].DAPO, 1)
    assert step_at(made.run_folder(dapo), made.scale) == 1  # two draws a step: half of the steps


def test_a_run_of_other_settings_is_refused(parts: Any, written: Any) -> None:
    made, _, _ = written
    run = made.scale.first_runs()[0]
    (made.run_folder(run) / "trained").write_text("--train.steps\n1\n")
    with pytest.raises(RuntimeError, match=rf"{made.run_folder(run)} is a run of other settings"):
        made.make_run(run)


def test_a_failed_command_stops_the_rest_and_names_its_log(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    (tmp_path / "says_out.py").write_text("def main(argv):\n    print('out')\n    return int(argv[0])\n")
    monkeypatch.syspath_prepend(tmp_path)

    def task(index: int) -> Any:
        def run() -> None:
            begun.append(index)
            parts["experiments"].command("says_out", [str(3 * (index == 1))], tmp_path / f"{index}.txt")

        return run

    made = parts["experiments"].Experiments(tmp_path, parts["arms"].QUICK, jobs=1)
    with pytest.raises(RuntimeError, match=rf"status 3 of: says_out 3\nits output: {tmp_path}/1.txt"):
        made._parallel("runs", [(str(i), task(i)) for i in range(20)])
    assert len(begun) < 20 and (tmp_path / "1.txt").read_text() == "out\n"
