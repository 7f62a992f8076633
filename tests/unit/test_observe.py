"""Metrics, samples, meters, console and versions."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from patience import patience

from megatron_dgpo.observe.console import COLUMNS, Console
from megatron_dgpo.observe.meters import PhaseTimer, Sums
from megatron_dgpo.observe.metrics import MetricsWriter, is_timing, read_metrics, without_timings
from megatron_dgpo.observe.run_info import versions, write_versions
from megatron_dgpo.observe.samples import SampleWriter, read_samples
from megatron_dgpo.types import Group, Prompt, Sample, VersionSpan


def row(step: int) -> dict[str, float]:
    return {"loss": math.sin(step) / 3, "tokens": step, "time/step": time.perf_counter()}


def test_metrics_come_back_exactly(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        numbers = {"loss": 1 / 3, "count": 7, "norm": torch.tensor(0.5), "bad": math.nan, "inf": math.inf}
        writer.write(1, numbers)
        writer.write(1, {"avg@8": 0.25}, phase="eval")
        rows = read_metrics(tmp_path)  # flushed: readable while the writer is open
    bad, inf = rows[0].pop("bad"), rows[0].pop("inf")
    assert rows == [
        {"step": 1, "phase": "train", "loss": 1 / 3, "count": 7, "norm": 0.5},
        {"step": 1, "phase": "eval", "avg@8": 0.25},
    ]
    assert math.isnan(bad) and math.isnan(inf)
    assert read_metrics(tmp_path / "metrics.jsonl", phase="eval") == rows[1:]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with MetricsWriter(whole, tensorboard=False) as writer:
        for step in range(1, 8):
            writer.write(step, row(step))
    first = MetricsWriter(broken, tensorboard=False)
    for step in range(1, 6):
        first.write(step, row(step))
    first.close()
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "phase": "tra')  # killed in the middle of a line
    assert [r["step"] for r in read_metrics(broken)] == [1, 2, 3, 4, 5]
    with MetricsWriter(broken, tensorboard=False) as resumed:
        assert (broken / "metrics.jsonl").read_bytes().endswith(b"}\n")
        resumed.truncate_after(3)
        for step in range(4, 8):
            resumed.write(step, row(step))
    got, expected = ([without_timings(r) for r in read_metrics(folder)] for folder in (broken, whole))
    assert got == expected
    assert [r["step"] for r in got] == list(range(1, 8))


def test_timing_names() -> None:
    names = ("time/generate", "tokens_per_second", "eval/tokens_per_second", "loss", "overtime", "timeouts")
    assert [is_timing(name) for name in names] == [True, True, True, False, False, False]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: not a JSON object"):
        read_metrics(path)
    with pytest.raises(ValueError, match="cannot be named 'step'"):
        MetricsWriter(tmp_path / "new", tensorboard=False).write(1, {"step": 2})


def test_tensorboard_holds_the_scalars_and_forgets_what_a_resume_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step / 2})
    with MetricsWriter(tmp_path, tensorboard=True) as resumed:
        resumed.truncate_after(3)
        for step in (4, 5):
            resumed.write(step, {"loss": 10.0 * step})
        resumed.write(5, {"avg": 0.5}, phase="eval")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    seen = {e.step: e.value for e in events.Scalars("train/loss")}
    assert seen == {1: 0.5, 2: 1.0, 3: 1.5, 4: 40.0, 5: 50.0}
    assert len(events.Scalars("train/loss")) == 5
    assert [(e.step, e.value) for e in events.Scalars("eval/avg")] == [(5, 0.5)]


def make_sample(prompt: Prompt, index: int, reward: float | None) -> Sample:
    return Sample(
        prompt, index, [5, 6, 0], [-0.1, -1 / 3, -2.5], "stop", (VersionSpan(12, 0, 3),), "é\u2028ß", reward,
        reward_parts={"format": 1.0}, reward_error="timed out" if reward is None else None, advantage=-0.5,
    )  # fmt: skip


def test_samples_come_back_and_the_file_is_never_partial(tmp_path: Path) -> None:
    prompts = [Prompt("d:1", (1, 2), "1+1?", "2"), Prompt("d:2", (3,), "2+2?", "4")]
    groups = [Group(p, [make_sample(p, 0, 1.0), make_sample(p, 1, None)]) for p in prompts]
    writer = SampleWriter(tmp_path)
    path = writer.write(12, groups)
    assert path == tmp_path / "samples" / "step_000012.jsonl"
    rows = read_samples(path)
    assert [(r["prompt_id"], r["index"], r["reward"]) for r in rows] == [
        ("d:1", 0, 1.0), ("d:1", 1, None), ("d:2", 0, 1.0), ("d:2", 1, None),
    ]  # fmt: skip
    assert rows[1] == {
        "step": 12, "prompt_id": "d:1", "index": 1, "prompt": "1+1?", "response": "é\u2028ß", "answer": "2",
        "reward": None, "reward_parts": {"format": 1.0}, "reward_error": "timed out", "advantage": -0.5,
        "finish_reason": "stop", "weight_versions": [[12, 0, 3]],
        "token_ids": [5, 6, 0], "log_probs": [-0.1, -1 / 3, -2.5],
    }  # fmt: skip
    groups[1].samples[0].reward_parts = {"broken": object()}  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        writer.write(12, groups)
    assert read_samples(path) == rows  # the failed write left the complete file in place


def test_sums_over_ranks_give_the_mean_over_all_values() -> None:
    values = {"reward": ([1.0, 0.0], [1.0, 1.0, 1.0, 0.0]), "only_here": ([4.0], [])}
    ranks = []
    for rank in range(2):
        sums = Sums()
        for name, parts in values.items():
            for value in parts[rank]:
                sums.add(name, torch.tensor(value, requires_grad=True) if rank else value)
        ranks.append(sums)
    ranks[0].add("tokens", 30.0, 12)
    ranks[1].add("tokens", torch.tensor(60.0), torch.tensor(3))
    merged = Sums()
    for sums in ranks:
        merged.merge(pickle.loads(pickle.dumps(sums.on_host())))  # as it travels between ranks
    expected = {"only_here": 4.0, "reward": 4 / 6, "tokens": 6.0}
    assert merged.values() == pytest.approx(expected, abs=1e-15)
    assert b"torch" not in pickle.dumps(ranks[1].on_host())
    merged.add("nothing", 0.0, 0)
    assert "nothing" not in merged.values()


def test_the_greatest_over_ranks_is_kept() -> None:
    ranks = []
    for rank in range(2):
        sums = Sums()
        for value in ([3.0, 1.0], [2.0, torch.tensor(5.5, requires_grad=True)])[rank]:
            sums.add_max("length", value)
        sums.add_max("gap", torch.tensor([-1.0, -2.0][rank]))
        ranks.append(sums)
    ranks[1].add_max("only_here", -7)
    ranks[0].add_max("broken", torch.tensor(math.nan))
    ranks[1].add_max("broken", 1.0)
    ranks[0].add_max("also_broken", 1.0)
    ranks[1].add_max("also_broken", math.nan)
    merged = Sums()
    for sums in ranks:
        assert b"torch" not in pickle.dumps(sums.on_host())
        merged.merge(pickle.loads(pickle.dumps(sums.on_host())))
    found = merged.values()
    assert math.isnan(found.pop("broken")) and math.isnan(found.pop("also_broken"))
    assert found == {"length": 5.5, "gap": -1.0, "only_here": -7.0}


def test_timer_accumulates_nests_and_resets() -> None:
    timer, started = PhaseTimer(), time.perf_counter()
    with timer("outer"):
        for _ in range(2):
            with timer("inner"):
                time.sleep(0.02)
    with pytest.raises(ZeroDivisionError), timer("failed"):
        1 / 0  # noqa: B018
    times, whole = timer.pop(), time.perf_counter() - started
    assert list(times) == ["time/inner", "time/outer", "time/failed"]
    assert 0.04 <= times["time/inner"] <= times["time/outer"] < whole
    assert timer.pop() == {}


def test_step_lines_are_aligned_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=False, rank=0)
    console.step_line(7, 120, {name: 0.5 for name, *_ in COLUMNS})
    console.step_line(119, 120, {"reward": 0.25, "tokens_per_second": 12345.0, "unknown": 3.0})
    first, second = capsys.readouterr().out.splitlines()
    assert len(first) == len(second)
    assert first.startswith("step   7/120  reward  0.500")
    assert second.startswith("step 119/120  reward  0.250  ent     -")
    assert "tok/s  12345" in second
    for _, label, *_ in COLUMNS:
        assert first.index(f"  {label} ") == second.index(f"  {label} ")


def test_step_lines_fit_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    large = {"reward": -1.25, "entropy": 11.931, "credit_effective_fraction": 1.0, "clip_fraction": 1.0,
             "grad_norm": 1234.5, "response_length": 16384.0, "truncated": 1.0,
             "tokens_per_second": 987654.3, "time/step": 1234.567}  # fmt: skip
    assert large.keys() == {name for name, *_ in COLUMNS}
    Console(quiet=False, rank=0).step_line(9998, 9999, large)
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) == 120
    assert line == (
        "step 9998/9999  reward -1.250  ent 11.93  eff 1.000  clip 1.000  grad  1234  len 16384  cut 1.00  "
        "tok/s 987654  sec 1235"
    )


def test_table_and_silence(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "start", "avg@8": 0.35678, "n": 64}, {"name": "end", "avg@8": 0.9, "pass@8": 1.0}]
    Console(quiet=True, rank=0).table("Held out", rows)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Held out",
        "name    avg@8   n  pass@8",
        "-----  ------  --  ------",
        "start  0.3568  64       -",
        "end       0.9   -       1",
    ]
    for console in (Console(quiet=True, rank=0), Console(quiet=False, rank=1)):
        console.log("x")
        console.step_line(1, 2, {})
    Console(quiet=False, rank=1).alert("x")
    Console(quiet=False, rank=1).table("t", rows)
    assert capsys.readouterr() == ("", "")
    for quiet in (False, True):
        Console(quiet, rank=0).alert("advisory")
        assert capsys.readouterr().out == "advisory\n"


@pytest.mark.parametrize(("quiet", "rank", "shown"), [(False, 0, True), (True, 0, False), (False, 1, False)])
def test_progress_shows_only_in_long_phases(capsys, monkeypatch, quiet: bool, rank: int, shown: bool) -> None:
    monkeypatch.setattr("megatron_dgpo.observe.console._DELAY", patience())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    console = Console(quiet, rank)
    with console.phase("generate", 4) as bar:
        bar.update(4)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("megatron_dgpo.observe.console._DELAY", 0.05)
    with console.phase("generate", 4) as bar:
        time.sleep(0.25)
        bar.update(2)
    error = capsys.readouterr().err
    assert ("generate" in error and "2/4" in error) == shown
    assert bool(error) == shown


def test_versions(tmp_path: Path) -> None:
    found = json.loads(write_versions(tmp_path / "run").read_text())
    assert found == versions()
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    root = Path(__file__).parents[2]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    if found["commit"] is not None:
        assert found["commit"] == head.stdout.strip()
        assert isinstance(found["modified"], bool)
