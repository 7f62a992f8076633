"""The credit report's data: bytes and their precision, steps, weights, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import credit_report
import numpy as np
import pytest
import torch
from bench.made_run import VOCAB_SIZE, make_run

from megatron_dgpo.algorithms import credit
from megatron_dgpo.observe import credit_log
from megatron_dgpo.observe.report import data, encode, html, steps, weights
from megatron_dgpo.observe.report.build import build
from megatron_dgpo.observe.report.rows import Pieces, Rows

SETTINGS = [(0.01, 1.0, "log_vocab"), (1.0, 0.5, "none"), (0.05, 0.0, "log_vocab"), (50.0, 2.5, "none")]


def decode(column: dict[str, Any], raw: bytes, count: int) -> tuple[list[float], bytes]:
    """Number by number, as the docstring of encode.py says it; and the bytes that are left."""
    if column["kind"] == "const":
        return [column["value"]] * count, raw
    width = {"u8": 1, "u16": 2, "u32": 4, "f16": 2, "f32": 4}.get(column["kind"]) or column["planes"]
    out = []
    for i in range(count):
        number = bytes(raw[p * count + i] for p in range(width))
        z = int.from_bytes(number, "little")
        if column["kind"] in ("f16", "f32"):
            out.append(float(np.frombuffer(number, "<f2" if width == 2 else "<f4")[0]))
        elif column["kind"] == "fixed":
            out.append(column["step"] * (z / 2 if z % 2 == 0 else -(z + 1) / 2))
        else:
            out.append(z)
    return out, raw[width * count :]


def unpack(raw: bytes) -> tuple[dict[str, Any], dict[str, list[float]]]:
    size = int.from_bytes(raw[:4], "little")
    header, rest = json.loads(raw[4 : 4 + size]), raw[4 + size :]
    columns = {}
    for column in header["columns"]:
        columns[column["name"]], rest = decode(column, rest, header["count"])
    assert rest == b""
    return header, columns


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder, steps=3, groups=2, group_size=4, tokens=(1, 90))
    return folder


@pytest.mark.parametrize("encoding", ("f32", "f16", 2.0**-20, 2.0**-7))
def test_floats_keep_what_they_promise(encoding: encode.Encoding) -> None:
    values = np.array([0.0, -0.25, 1e-7, 3.14159, -11.5, 0.999, 2.0**-8, -(2.0**-30)], dtype=np.float32)
    column, raw = encode.floats("x", values, encoding)
    found, rest = decode(column, raw, len(values))
    assert rest == b""
    if isinstance(encoding, float):
        assert np.abs(np.array(found) - values).max() <= encoding / 2
    else:
        np.testing.assert_array_equal(found, values.astype({"f32": np.float32, "f16": np.float16}[encoding]))


def test_numbers_that_fixed_point_cannot_hold_stay_float32() -> None:
    for odd in (math.nan, math.inf, 1e30):
        column, raw = encode.floats("x", np.array([0.5, odd], dtype=np.float32), 2.0**-10)
        assert column["kind"] == "f32"
        np.testing.assert_array_equal(decode(column, raw, 2)[0], np.float32([0.5, odd]))


def test_a_sample_is_the_rows_of_the_log(run: Path) -> None:
    for number, row in enumerate(credit_log.rows(run, steps=[20])):
        header, columns = unpack(data.sample(run, 20, 0, number))
        pieces = [header["pieces"][int(place)] for place in columns["token"]]
        assert pieces == [list(pair) for pair in zip(row["token_id"], row["token_text"], strict=True)]
        for name in ("entropy", "log_prob", "ratio", "reverse_kl", "token_advantage", "clipped"):
            assert columns[name] == row[name], name
        assert columns["distance"] == row["hellinger"] and "weight" not in columns
        engine = np.array(columns["log_prob"]) + columns["gap"]
        np.testing.assert_allclose(engine, row["engine_log_prob"], rtol=1e-6, atol=1e-6)
        assert header["versions"] == [[19, 0, header["count"]]]
        assert sum(header["steps"]["sentences"]) == sum(header["steps"]["arithmetic"]) == header["count"]


def test_recorded_weights_are_kept_where_the_formula_gives_others(run: Path) -> None:
    table = credit_log.read(credit_log.files(run)[0])
    settings = credit_log.settings(table)
    for changed in ({"tau": 0.2}, {"credit": "uniform"}):
        _, columns = unpack(Rows(table, settings | changed).encode(1, encode.LADDER[-1], None))
        assert columns["weight"] == table.column("weight")[1].as_py()


@pytest.mark.parametrize(("tau", "kappa", "normalization"), SETTINGS)
def test_weights_are_the_trainers(tau: float, kappa: float, normalization: str) -> None:
    rng = np.random.default_rng(3)
    d, h = (rng.random(200) ** 4).astype(np.float32), (12 * rng.random(200) ** 4).astype(np.float32)
    d[:3], h[2:5] = 0, [0, -1e-7, 11.95]
    settings = {"tau": tau, "kappa": kappa, "entropy_normalization": normalization, "vocab_size": VOCAB_SIZE}
    found = weights.weights(d, h, settings)
    expected = credit.credit_weights(
        torch.from_numpy(d), torch.from_numpy(h), torch.tensor([0, 200]), **settings
    )
    np.testing.assert_allclose(found, expected.weights, rtol=1e-6)
    assert weights.effective_fraction(found) == pytest.approx(float(expected.effective_fraction[0]), rel=1e-5)
    for halves in ((2.0**-12, 2.0**-9), (2.0**-8, 0.0), (0.0, 2.0**-6)):
        bound = weights.error_bound(d, h, settings, halves)
        worst = 0.0
        for _ in range(50):
            signs = rng.choice([-1, 1], (2, 200))
            moved = weights.weights(d + signs[0] * halves[0], h + signs[1] * halves[1], settings)
            worst = max(worst, float(np.abs(moved / found - 1).max()))
        assert 0 < worst <= bound or worst == bound == 0


def test_shares_of_the_heaviest_tokens() -> None:
    w = np.array([0.0] * 90 + [1.0] * 9 + [11.0])
    assert weights.top_share(w, 0.01) == pytest.approx(11 / 20)
    assert weights.top_share(w, 0.1) == pytest.approx(1.0)
    assert weights.top_share(w[-5:], 0.01) == pytest.approx(11 / 15)  # at least one token
    assert weights.top_share(w[:0], 0.1) == 0 and weights.effective_fraction(w[:0]) == 1


def test_steps_are_runs_of_whole_tokens() -> None:
    pieces = [*("Let", " x", " be", " 3", ".5", "."), *(" Then", " 2x", " =", " 7", ".\n\n")]
    pieces += ["So", " it", " is", "."]
    assert steps.sentences(pieces) == [6, 5, 4]
    assert steps.arithmetic(pieces) == [11, 4]
    assert steps.arithmetic([*"a=1;b=2;#3", "<eos>"]) == [4, 4, 3]
    assert steps.arithmetic(["x;y", ";", "", "z", "; ", ";"]) == [1, 1, 4]  # y's step has no token of its own
    assert steps.arithmetic([";", ";"]) == [2] and steps.arithmetic([]) == steps.sentences([]) == []
    assert steps.sentences(["", "\n"]) == [2]


def test_overview_counts_what_the_log_has(run: Path) -> None:
    rows = list(credit_log.rows(run))
    found = data.overview(run)
    samples = found["samples"]
    assert [found["files"][f]["step"] for f in samples["file"]] == [r["step"] for r in rows]
    assert [found["prompts"][p]["text"] for p in samples["prompt"]] == [r["prompt"] for r in rows]
    assert samples["length"] == [len(r["token_id"]) for r in rows]
    assert samples["right"] == [r["reward"] > 0 for r in rows]
    assert samples["max_weight"] == pytest.approx([max(r["weight"]) for r in rows])
    assert len(found["prompts"]) == 6 and found["metrics"]["train"]["step"] == list(range(1, 31))
    assert found["metrics"]["eval"]["avg@8"][0] == pytest.approx(0.3, abs=0.5)
    json.dumps(found, allow_nan=False)


def test_a_damaged_file_is_named_and_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    damaged = credit_log.files(tmp_path / "run")[1]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert credit_report.main([str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert str(damaged) in said.err and "left out" in said.err and ": 16 samples" in said.out
    assert (tmp_path / "run" / "credit_report.html").exists()


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "quiet").mkdir()
    (tmp_path / "quiet" / "metrics.jsonl").write_text("")
    for words, wanted in (
        ([tmp_path / "none"], "no such run"),
        ([tmp_path / "empty"], "not the folder of a run"),
        ([run / "metrics.jsonl"], "not the folder of a run"),
        ([tmp_path / "quiet"], "observe.credit_every"),
        ([run, "--compare", tmp_path / "none"], "no such run"),
        ([run, "--out", tmp_path / "no" / "file.html"], "there is no folder"),
        ([run, "--max-mb", "0.01", "--out", tmp_path / "small.html"], "page without any sample"),
    ):
        assert credit_report.main([str(word) for word in words]) == 2, words
        said = capsys.readouterr().err
        assert wanted in said and said.count("\n") == 1, said
    assert not list(tmp_path.glob("*.html*"))


def test_a_small_file_leaves_whole_groups_out_and_says_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "run", steps=4, groups=3, group_size=4, tokens=400)
    whole = build([tmp_path / "run"], tmp_path / "whole.html", max_bytes=10**8)
    size = 0.3 * whole.size / 1e6
    assert credit_report.main([str(tmp_path / "run"), f"--max-mb={size}"]) == 0
    said = capsys.readouterr()
    assert (tmp_path / "run" / "credit_report.html").stat().st_size <= 1e6 * size
    left = json.loads(
        "{" + said.err.partition("--max-mb): ")[2].strip().replace("step ", '"').replace(":", '":') + "}"
    )
    kept = int(said.out.split(": ")[1].split()[0])
    assert sum(left.values()) == 48 - kept and 0 < kept < 48
    assert all(count % 4 == 0 for count in left.values())
    assert "no weight is off by more than" in said.out


def test_embedded_json_cannot_leave_its_element() -> None:
    text = "".join(html.document("</title><script>", {"kind": "</script><!--", "runs": []}))
    assert "</script><!--" not in text and "<title>&lt;/title&gt;&lt;script&gt;</title>" in text
    assert (
        text.count("<script") == 2
        and "'unsafe" not in html.policy()
        and "default-src 'none'" in html.policy()
    )


def test_shared_pieces_are_numbered_once() -> None:
    pieces = Pieces()
    assert [pieces.place(7, "a"), pieces.place(7, ""), pieces.place(7, "a")] == [0, 1, 0]
    assert pieces.pairs() == [[7, "a"], [7, ""]]
