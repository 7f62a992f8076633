"""tools/evaluate.py on a tiny model: its numbers, its file of samples, and what it refuses."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import convert_checkpoint
import evaluate
import pytest
from tiny import write_model, write_tokenizer

PROMPTS = ("abc", "1+2", "dog", "77", "a=b")
K = 6
Capsys = pytest.CaptureFixture[str]


def even(text: str, gold: str, **_: Any) -> float:
    """A reward that a random policy gets about half of the time."""
    return float(sum(map(str.isdigit, text)) % 2 == 0)


def letter(text: str, gold: str, **_: Any) -> float:
    return float(text[:1].isalpha())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_tokenizer(write_model(folder / "model", tied=True))
    rows = [{"prompt": prompt, "answer": "1"} for prompt in (*PROMPTS, *PROMPTS[:2])]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(place: Path, out: Path, *words: object, model: str = "model", reward: str = "even") -> int:
    given = [place / model, "--data", place / "data.jsonl", "--no-chat-template", "--k", K, "--out", out]
    given += ["--max-new-tokens", 8, "--reward", f"test_evaluate_tool:{reward}", "--reward-workers", 0]
    return evaluate.main([*map(str, given), "--top-p", "1.0", *map(str, words)])


def samples(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    return sorted(rows, key=lambda row: (row["prompt"], row["index"]))


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    out = place / "whole.jsonl"
    assert run(place, out, "--json", place / "whole.json") == 0
    return out


def test_numbers_are_those_of_the_samples(place: Path, whole: Path) -> None:
    """Each metric by its definition, from the file alone; the repeated problems count once."""
    rows = samples(whole)
    assert len(rows) == len(PROMPTS) * K and len({row["question"] for row in rows}) == len(PROMPTS)
    avg, passes, cons = [], [], []
    for _, of in itertools.groupby(rows, key=lambda row: row["prompt"]):
        group = list(of)
        rewards = [row["reward"] for row in group]
        assert rewards == [even(row["text"], "1") for row in group]
        avg.append(sum(rewards) / K)
        passes.append(float(any(rewards)))
        votes = Counter(row["answer"] for row in group if row["answer"] is not None)
        best = [a for a in votes if votes[a] == max(votes.values())][:1]  # the first seen of a tie
        cons.append(next((row["reward"] for row in group if row["answer"] in best), 0.0))
    found = json.loads((place / "whole.json").read_text())
    for name, values in ((f"avg@{K}", avg), (f"pass@{K}", passes), (f"cons@{K}", cons)):
        assert found[name] == pytest.approx(sum(values) / len(values), abs=1e-12), name
        assert min(values) <= found[f"{name}_low"] <= found[name] <= found[f"{name}_high"] <= max(values)
    assert 0 < found[f"avg@{K}"] < 1
    assert found["mean_response_tokens"] == sum(len(row["token_ids"]) for row in rows) / len(rows)
    assert found["truncation_rate"] == sum(row["finish_reason"] == "length" for row in rows) / len(rows)
    assert (found["num_problems"], found["num_samples"]) == (len(PROMPTS), len(rows))


def test_it_goes_on_from_its_samples(place: Path, whole: Path, tmp_path: Path, capsys: Capsys) -> None:
    """From two of five problems, the second's last line cut by a kill: the same samples in the end."""
    out = tmp_path / "out.jsonl"
    assert run(place, out, "--max-problems", 2) == 0
    out.write_bytes(out.read_bytes()[:-20])
    capsys.readouterr()
    assert run(place, out, "--json", tmp_path / "again.json") == 0
    assert "1 of 5 problems are in" in capsys.readouterr().out
    kept = {(row["prompt"], row["index"]): row for row in samples(out)}
    assert list(kept.values()) == samples(whole)
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((place / "whole.json").read_text())


def test_nothing_is_drawn_where_all_is_there(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "draw", None)
    before = whole.read_bytes()
    assert run(place, whole) == 0
    assert whole.read_bytes() == before


def test_regrade(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.setattr(evaluate, "draw", None)
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole.read_bytes())
    assert run(place, out, "--regrade", reward="letter") == 0
    rows, old = samples(out), samples(whole)
    assert [row["reward"] for row in rows] == [letter(row["text"], "1") for row in rows]
    assert [row["reward"] for row in rows] != [row["reward"] for row in old]
    same = ("prompt", "index", "question", "gold", "text", "finish_reason", "token_ids")
    assert [[row[key] for key in same] for row in rows] == [[row[key] for key in same] for row in old]
    assert list(tmp_path.iterdir()) == [out]

    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-1]))
    assert run(place, out, "--regrade") == 2
    assert f"{out} lacks samples of 1 problems, such as data:5" in capsys.readouterr().err
    assert out.read_text() == "".join(lines[:-1])


def test_samples_of_other_settings_are_not_mixed_in(
    place: Path, whole: Path, tmp_path: Path, capsys: Capsys
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole.read_bytes())
    assert run(place, out, "--temperature", "0.5") == 2
    assert (
        "has samples of temperature = 1.0, not 0.5; give the same, or another file" in capsys.readouterr().err
    )
    assert out.read_bytes() == whole.read_bytes()
    out.write_text("{}\n")
    assert run(place, out) == 2
    assert "does not begin with an evaluation's settings" in capsys.readouterr().err


def test_an_imported_checkpoint_gives_the_folders_samples(place: Path, whole: Path, tmp_path: Path) -> None:
    assert convert_checkpoint.main(["import", str(place / "model"), str(place / "megatron")]) == 0
    out = tmp_path / "out.jsonl"
    assert run(place, out, model="megatron") == 0
    assert samples(out) == samples(whole)


def test_greedy_is_one_answer(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run(place, out, "--temperature", "0") == 0
    for _, group in itertools.groupby(samples(out), key=lambda row: row["prompt"]):
        assert len({row["text"] for row in group}) == 1


@pytest.mark.parametrize(
    ("row", "words", "says"),
    [
        ({"prompt": "abc", "answer": "2"}, [], "data:1 and bad:1 are the same prompt with different answers"),
        ({"prompt": "a" * 60, "answer": "2"}, [], "bad:1: 60 tokens and --max-new-tokens make 68, and the"),
        ({"prompt": "abc"}, [], "bad.jsonl, row 1: no key 'answer'"),
        (None, ["--reward", "test_evaluate_tool:none"], "test_evaluate_tool"),
        (None, ["--data", "no/such.jsonl"], "no/such.jsonl does not exist"),
    ],
)
def test_refused(
    place: Path, tmp_path: Path, capsys: Capsys, row: dict[str, str] | None, words: list[str], says: str
) -> None:
    if row is not None:
        (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
        words = ["--data", str(place / "data.jsonl"), str(tmp_path / "bad.jsonl")]
    assert run(place, tmp_path / "out.jsonl", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and not (tmp_path / "out.jsonl").exists()


def test_refused_words(place: Path, capsys: Capsys) -> None:
    refused = {
        "--k 0: at least 1": ["--k", "0"],
        "--regrade needs --out": ["--regrade"],
        "--servers-load needs --engine sglang": ["--servers-load"],
    }
    for says, words in refused.items():
        with pytest.raises(SystemExit):
            evaluate.main([str(place / "model"), "--data", "x.jsonl", *words])
        assert says in capsys.readouterr().err
