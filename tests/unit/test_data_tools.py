"""tools/preprocess_data.py, tools/check_rewards.py and data sets of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_rewards
import preprocess_data
import pyarrow
import pyarrow.parquet as pq
import pytest
from hub import SHA, Hub
from patience import patience

from megatron_dgpo.config.sources import HubDataset, parse_source
from megatron_dgpo.rewards.exact import ExactMatch

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return path

    return write


def plain(prompt: str, answer: Any) -> dict[str, Any]:
    return {"prompt": prompt, "answer": answer}


def written(path: Path) -> list[tuple[str, str]]:
    rows = pq.read_table(path).to_pylist() if path.suffix == ".parquet" else read(path)
    return [(row["prompt"][-1]["content"], row["answer"]) for row in rows]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- preprocess_data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_layouts_become_one(jsonl: Any, tmp_path: Path, kind: str, capsys: Capsys) -> None:
    dapo = tmp_path / "dapo.parquet"
    message = [{"role": "user", "content": "2+2?"}]
    row = {"prompt": message, "reward_model": {"ground_truth": "4"}, "data_source": "math_dapo"}
    pq.write_table(pyarrow.Table.from_pylist([row, row]), dapo)
    mixed = jsonl(plain("1+1?", 2), {"question": "3+3?", "answer": "3 + 3 is\n#### 6"}, plain("2+2?", "4"))
    out = tmp_path / f"out.{kind}"
    assert preprocess_data.main([str(dapo), str(mixed), "--out", str(out), "--final-answers"]) == 0
    assert written(out) == [("2+2?", "4"), ("1+1?", "2"), ("3+3?", "6")]
    text = capsys.readouterr().out
    assert f"left out, repeated: 2, such as {dapo}, row 2: as {dapo}, row 1" in text
    assert "characters: mean 4.0, shortest 4, median 4" in text
    # What is written is read again, and nothing changes any more.
    again = tmp_path / f"again.{kind}"
    assert preprocess_data.main([str(out), "--out", str(again)]) == 0
    assert written(again) == written(out)


def test_different_answers_leave_out_every_row_of_the_prompt(
    jsonl: Any, tmp_path: Path, capsys: Capsys
) -> None:
    data = jsonl(plain("a", 1), plain("b", 2), plain("a", 3), plain("a", 1))
    out, rejected = tmp_path / "out.jsonl", tmp_path / "rejected.jsonl"
    assert preprocess_data.main([str(data), "--out", str(out), "--rejected", str(rejected)]) == 0
    assert written(out) == [("b", "2")]
    assert [(r["reason"], r["row"]) for r in read(rejected)] == [
        ("different answers", f"{data}, row {n}: '{a}' among ['1', '3']") for n, a in ((1, 1), (3, 3), (4, 1))
    ]


BAD = (
    ("{not json", "not valid JSON"),
    ("[1]", "expected a JSON object, got list"),
    ({"prompt": "p"}, "no key 'answer'"),
    (plain("p", ""), "'answer' is empty"),
    (plain("", "1"), "'prompt' is empty"),
    ({"prompt": [{"role": "user"}], "answer": "1"}, "message 1 of 'prompt' has no string 'content'"),
)


def test_malformed_rows_are_all_named(jsonl: Any, tmp_path: Path, capsys: Capsys) -> None:
    data = jsonl(plain("ok", 1), *(row for row, _ in BAD))
    out, rejected = tmp_path / "out.jsonl", tmp_path / "rejected.jsonl"
    words = [str(data), "--out", str(out), "--rejected", str(rejected)]
    assert preprocess_data.main([*words, "--strict"]) == 2
    error = capsys.readouterr().err
    assert all(f"{data}, row {n}: {why}" in error for n, (_, why) in enumerate(BAD, start=2))
    assert not out.exists()
    assert preprocess_data.main(words) == 0
    assert written(out) == [("ok", "1")] and {row["reason"] for row in read(rejected)} == {"malformed"}
    assert len(read(rejected)) == len(BAD)


def test_lengths_are_those_of_the_tokenizer(
    jsonl: Any, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "examples" / "quickstart"))
    from make_data import write_model

    write_model(tmp_path / "model")  # one token a character, two more from the template
    data = jsonl(*(plain("1" * n, 1) for n in range(1, 11)))
    out = tmp_path / "out.jsonl"
    words = [str(data), "--out", str(out), "--tokenizer", str(tmp_path / "model")]
    assert preprocess_data.main([*words, "--max-prompt-tokens", "8"]) == 0
    assert [prompt for prompt, _ in written(out)] == ["1" * n for n in range(1, 7)]
    text = capsys.readouterr().out
    assert "tokens: mean 5.5, shortest 3, median 6" in text
    assert f"left out, too long: 4, such as {data}, row 7: 9 tokens, at most 8" in text
    assert preprocess_data.main([*words, "--max-prompt-tokens", "2"]) == 2
    assert "no problem is left of" in capsys.readouterr().err and len(written(out)) == 6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["x.jsonl", "--out", "x.csv"], "expected .jsonl or .parquet"),
        (["x.jsonl", "--out", "y.jsonl", "--max-prompt-tokens", "3"], "needs --tokenizer"),
    ],
)
def test_refused_words(words: list[str], says: str, capsys: Capsys) -> None:
    with pytest.raises(SystemExit):
        preprocess_data.main(words)
    assert says in capsys.readouterr().err


# --- check_rewards --------------------------------------------------------------------------------------


def test_every_bad_gold_is_named(jsonl: Any, capsys: Capsys) -> None:
    golds = ("\\frac{1}{2}", "x^2+", "so\n#### 1,234")
    data = jsonl(*(plain("a", gold) for gold in golds), {"prompt": "d"}, plain("e", "3"))
    assert check_rewards.main([str(data), "--reward-workers", "0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if f"{data}, row 4: no key 'answer'" in line]
    assert [line for line in lines if f"{data}, row 2: " in line]
    assert lines[-1] == "3 of 5 gold answers are right by the reward math_verify" and len(lines) == 3


def test_golds_that_are_no_answers_are_named_and_unusual_ones_are_not(jsonl: Any, capsys: Capsys) -> None:
    solution = "Add: 3 + 4.\nSo it is $\\boxed{7}$.\n\n#### Remark\nThere is another way."
    good = [
        "2*pi",
        "4*sin(pi*x/3)+2",
        "x**2",
        "9:30 a.m.",
        "3:00",
        solution,
        '["34", "35"]',
        "\\fbox{7}",
        "x=34",
    ]
    good += ["The answer is 34", "Yes", "ABC", "1011_2", "2 1/2", "x \\in [-2,7]", "\\text{(B)}", "-5\\%"]
    bad = ["N/A", "proof", "nan", "We omit the proof of this statement.", "See the solution above.", "???"]
    data = jsonl(*(plain(f"question {n}", gold) for n, gold in enumerate(good + bad)))
    assert check_rewards.main([str(data), "--reward-workers", "0"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    rows = range(len(good) + 1, len(good + bad) + 1)
    assert [line.partition(": FAILED, UnreadableGold: ")[0] for line in lines] == [
        f"{data}, row {n}" for n in rows
    ]
    assert last == f"{len(good)} of {len(good + bad)} gold answers are right by the reward math_verify"


@pytest.mark.parametrize(
    ("reward", "gold"),
    [("math_verify", "7"), ("hash_answer", "7"), ("exact_match", "seven"), ("multiple_choice", "C")],
)
def test_each_reward_takes_its_own_form(jsonl: Any, capsys: Capsys, reward: str, gold: str) -> None:
    words = [str(jsonl(plain("a", gold))), "--reward", reward, "--reward-workers", "0"]
    assert check_rewards.main(words) == 0
    assert check_rewards.main([*words, "--response", "{} no. Answer: 8"]) == 1
    assert f"row 1: scores 0: '{gold} no. Answer: 8' against" in capsys.readouterr().out


def test_a_function_that_fails_is_no_wrong_answer(jsonl: Any, capsys: Capsys) -> None:
    words = ["--reward", "user_rewards:no_such"]
    assert check_rewards.main([str(jsonl(plain("a", 1))), *words]) == 2
    assert "error: " in capsys.readouterr().err
    words = ["--reward", "operator:truediv", "--reward-workers", "0"]
    assert check_rewards.main([str(jsonl(plain("a", 1))), *words]) == 1
    assert "row 1: FAILED, " in capsys.readouterr().out


def test_a_check_that_crashed_has_found_nothing(
    jsonl: Any, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its status is not that of bad rows."""

    class Crashing(ExactMatch):
        def score(self, samples: Any) -> None:
            raise RuntimeError("a worker did not start")

    monkeypatch.setattr(check_rewards, "build_reward", lambda *_, **__: Crashing())
    assert check_rewards.main([str(jsonl(plain("a", 1)))]) == 2
    said = capsys.readouterr()
    assert "error: the check ended early: RuntimeError: a worker did not start" in said.err
    assert "gold answers are right" not in said.out


# --- the hub --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("hub://acme/sums", HubDataset("acme/sums")),
        ("hub://acme/sums/main?split=test", HubDataset("acme/sums", "main", "test")),
        (
            "hub://acme/sums?split=train&revision=v1.0",
            HubDataset("acme/sums", split="train", revision="v1.0"),
        ),
        ("data/x.jsonl", Path("data/x.jsonl")),
    ],
)
def test_names_of_sources(text: str, wanted: Any) -> None:
    assert parse_source(text) == wanted and parse_source(str(wanted)) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "hub://",
        "hub://acme",
        "hub://a/b/c/d",
        "hub://a/b?spilt=x",
        "hub://a/b?split=",
        "hub://a/b?split=x&split=y",
    ],
)
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected hub://owner/name\[/config\]"):
        parse_source(text)


CARD = b"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test.jsonl\n---\n"
ROWS = b"".join(b'{"question": "1+%d?", "answer": "#### %d", "more": 1}\n' % (n, 1 + n) for n in (1, 2))
USE = """
import sys
import preprocess_data
for source in sys.argv[2:]:
    print(preprocess_data.main([source, "--out", sys.argv[1]]))
"""


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    """The real `datasets` against a hub of one data set, in a process of its own: it reads where the hub is
    when it is imported."""
    out = tmp_path / "out.jsonl"
    sources = [f"hub://acme/sums/main?split=test&revision={SHA}", "hub://acme/sums/main", "hub://acme/none"]
    with Hub("acme/sums", {"README.md": CARD, "main/test.jsonl": ROWS}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", USE, str(out), *sources],
            cwd=Path(__file__).resolve().parents[2] / "tools",
            env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience(),
        )
        assert any("resolve" in request and "test.jsonl" in request for request in hub.requests)
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["0", "2", "2"], done.stderr
    assert written(out) == [("1+1?", "#### 2"), ("1+2?", "#### 3")]
    assert [row["id"] for row in read(out)] == ["sums-main-test:1", "sums-main-test:2"]
    assert "error: hub://acme/sums/main?split=train: ValueError: Unknown split" in done.stderr
    assert "error: hub://acme/none?split=train: DatasetNotFoundError" in done.stderr
