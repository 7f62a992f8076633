"""tools/evaluate.py on a tiny model: its numbers, its file of samples, and what it refuses."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import convert_checkpoint
import evaluate
import evaluation_run
import pytest
from safetensors.torch import load_file, save_file
from tiny import write_model, write_tokenizer

import megatron_dgpo.weights.fingerprint as module_of_fingerprint
from megatron_dgpo.rollout.engine import EnginesLost
from megatron_dgpo.types import Group, Sample
from megatron_dgpo.weights.fingerprint import fingerprint

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
    values: dict[str, list[float]] = {name: [] for name in ("avg@6", "pass@6", "cons@6")}
    values |= {f"pass@{j}": [] for j in (1, 2, 4)}
    for _, of in itertools.groupby(rows, key=lambda row: row["prompt"]):
        group = list(of)
        rewards = [row["reward"] for row in group]
        assert rewards == [even(row["text"], "1") for row in group]
        values["avg@6"].append(sum(rewards) / K)
        for j in (1, 2, 4, 6):
            subsets = [any(some) for some in itertools.combinations(rewards, j)]
            values[f"pass@{j}"].append(sum(subsets) / len(subsets))
        votes = Counter(row["answer"] for row in group if row["answer"] is not None)
        best = [a for a in votes if votes[a] == max(votes.values())][:1]  # the first seen of a tie
        judged = [row["reward"] for row in group if row["answer"] in best]
        values["cons@6"].append(float(2 * sum(judged) > len(judged)))
        assert all(row["answer"] is None for row in group if row["finish_reason"] == "length")
    found = json.loads((place / "whole.json").read_text())
    assert found["files"] == {"data": {name: of for name, of in found.items() if name != "files"}}
    for name, of in values.items():
        low, high = found[f"{name}_low"], found[f"{name}_high"]
        assert found[name] == pytest.approx(sum(of) / len(of), abs=1e-12), name
        # A mean of equal numbers may be off by its rounding.
        assert min(of) <= low <= found[name] + 1e-12 and found[name] - 1e-12 <= high <= max(of)
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
    monkeypatch.setattr(evaluation_run, "draw", None)
    before = whole.read_bytes()
    assert run(place, whole) == 0
    assert whole.read_bytes() == before


def test_regrade(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.setattr(evaluation_run, "draw", None)
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
    assert "samples of temperature = 1.0, not 0.5; give the same, or another --out" in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes()
    out.write_text("{}\n")
    assert run(place, out) == 2
    assert "does not begin with an evaluation's settings" in capsys.readouterr().err


def edit(folder: Path, name: str, row: int) -> None:
    """Change one number of a model folder's weights."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name][row] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_samples_of_other_weights_are_not_taken_for_the_models(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    """A run writes another policy into the folder: the same command does not report the old one's numbers."""
    shutil.copytree(place / "model", tmp_path / "model")
    shutil.copy(place / "data.jsonl", tmp_path)
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(evaluation_run, "draw", None)
    header, *rows = whole.read_text().splitlines(keepends=True)
    moved = header.replace(str(place), str(tmp_path))
    out.write_text(moved + "".join(rows))
    assert run(tmp_path, out) == 0  # a copy of the folder is the same model
    edit(tmp_path / "model", "model.norm.weight", 7)
    assert run(tmp_path, out) == 2
    assert f"{out} has samples of other weights (fingerprint" in (said := capsys.readouterr().err)
    assert said.endswith("it has changed since; give another --out\n")
    assert out.read_text() == moved + "".join(rows)
    # What was drawn can be graded again, and is not called the new model's.
    assert run(tmp_path, out, "--regrade", reward="letter") == 0
    assert "these are numbers of the weights that drew the samples" in capsys.readouterr().out
    assert run(tmp_path, out, reward="letter") == 2


def test_rewards_are_not_mixed(place: Path, whole: Path, tmp_path: Path, capsys: Capsys) -> None:
    """Interrupted under one reward, it does not go on under another; --regrade makes them one."""
    out = tmp_path / "out.jsonl"
    assert run(place, out, "--max-problems", 2) == 0
    before = out.read_bytes()
    assert run(place, out, reward="letter") == 2
    assert "--regrade scores them anew without drawing any, or give another --out" in capsys.readouterr().err
    assert run(place, out, "--regrade", "--max-problems", 1, reward="letter") == 2
    assert "has samples of 1 problems that are not asked for, such as data:2" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert run(place, out, "--regrade", "--max-problems", 2, reward="letter") == 0
    assert run(place, out, reward="letter") == 0
    assert [row["reward"] for row in samples(out)] == [letter(row["text"], "1") for row in samples(whole)]


def test_a_reward_whose_code_has_changed_is_another(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "my_changing_reward.py"
    module.write_text("def judge(text, gold, **_):\n    return 1.0\n")
    out, words = tmp_path / "out.jsonl", ["--reward", "my_changing_reward:judge", "--max-problems", 1]
    assert run(place, out, *words) == 0
    module.write_text("def judge(text, gold, **_):\n    return 0.0\n")
    assert run(place, out, *words) == 2
    assert "has samples scored with reward_source" in capsys.readouterr().err


def test_samples_belong_to_their_questions(place: Path, whole: Path, tmp_path: Path, capsys: Capsys) -> None:
    """Rows are found by file and number: what stands there now has to be what was asked."""
    shutil.copytree(place / "model", tmp_path / "model")
    out, data = tmp_path / "out.jsonl", tmp_path / "data.jsonl"
    text = whole.read_text().replace(str(place), str(tmp_path))
    rows = (place / "data.jsonl").read_text()
    for change, says in {
        (
            '"dog"',
            '"cat"',
        ): "has samples of data:3 as 'dog', and the data has 'cat' there: the data, the chat",
        (
            '"77", "answer": "1"',
            '"77", "answer": "2"',
        ): "samples of data:4 scored against '1', and the data has '2'",
    }.items():
        out.write_text(text)
        data.write_text(rows.replace(*change))
        assert run(tmp_path, out) == 2
        assert says in (said := capsys.readouterr().err) and "give another --out" in said
        assert out.read_text() == text
    assert run(tmp_path, out, "--regrade") == 0  # by the new gold answer
    assert {row["gold"] for row in samples(out) if row["prompt"] == "data:4"} == {"2"}
    data.write_text(rows.replace('"dog"', '"cat"'))
    assert run(tmp_path, out, "--regrade") == 2


def test_each_file_has_its_own_numbers(place: Path, tmp_path: Path, capsys: Capsys) -> None:
    """A problem of both files is drawn once and counts in both."""
    rows = [{"prompt": prompt, "answer": "1"} for prompt in ("77", "new", "dog")]
    (tmp_path / "second.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, metrics = tmp_path / "out.jsonl", tmp_path / "metrics.json"
    files = ["--data", place / "data.jsonl", tmp_path / "second.jsonl"]
    assert run(place, out, *files, "--json", metrics) == 0
    said, found = capsys.readouterr().out, json.loads(metrics.read_text())
    assert "data: 5 problems, 6 samples each" in said and "second: 3 problems, 6 samples each" in said
    drawn = samples(out)
    assert len(drawn) == 6 * K
    for stem, prompts in {"data": PROMPTS, "second": ("77", "new", "dog")}.items():
        rewards = [row["reward"] for row in drawn if row["question"] in prompts]
        assert found["files"][stem]["avg@6"] == pytest.approx(sum(rewards) / len(rewards))
        assert found["files"][stem]["num_problems"] == len(prompts)
    assert found["num_problems"] == 6
    assert found["files"]["data"]["avg@6"] != found["files"]["second"]["avg@6"] != found["avg@6"]


def test_a_coroutine_scores(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = ["--reward", "user_rewards:judge", "--max-problems", 2, "--max-new-tokens", 4]
    assert run(place, out, *words) == 0
    assert [row["reward"] for row in samples(out)] == [float("1" in row["text"]) for row in samples(out)]


class Dying:
    """An engine whose servers die when it has drawn its first group, the others being half done."""

    def generate(self, prompts: Any, params: Any, *, on_group: Any, **_: Any) -> None:
        texts = [f"{i}" for i in range(params.n)]
        on_group(
            Group(prompts[0], [Sample(prompts[0], i, [1], [0.0], "stop", (), t) for i, t in enumerate(texts)])
        )
        raise EnginesLost("no SGLang server is left: http://x (gone)", [None] * len(prompts))

    def close(self) -> None:
        pass


def test_lost_servers_are_told_and_what_is_there_is_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    out, real = tmp_path / "out.jsonl", evaluation_run._embedded
    monkeypatch.setattr(evaluation_run, "_embedded", lambda *_: Dying())
    assert run(place, out) == 3
    said = f"1 of 5 problems are done and in {out}, from which the same command goes on\n"
    assert capsys.readouterr().err.endswith(f"error: no SGLang server is left: http://x (gone); {said}")
    assert [row["reward"] for row in samples(out)] == [even(str(i), "1") for i in range(K)]
    monkeypatch.setattr(evaluation_run, "_embedded", real)
    assert run(place, out) == 0
    assert "1 of 5 problems are in" in capsys.readouterr().out and len(samples(out)) == 5 * K


def test_an_imported_checkpoint_gives_the_folders_samples(place: Path, whole: Path, tmp_path: Path) -> None:
    assert convert_checkpoint.main(["import", str(place / "model"), str(place / "megatron")]) == 0
    out = tmp_path / "out.jsonl"
    assert run(place, out, model="megatron") == 0
    assert samples(out) == samples(whole)
    # The fingerprint is of the checkpoint's files.
    of_checkpoint = fingerprint(place / "megatron")
    assert json.loads(out.read_text().splitlines()[0])["evaluation"]["weights"] == of_checkpoint
    shutil.copytree(place / "model", tmp_path / "model")
    edit(tmp_path / "model", "model.norm.weight", 7)
    convert_checkpoint.main(["import", str(tmp_path / "model"), str(tmp_path / "megatron")])
    assert fingerprint(tmp_path / "megatron") != of_checkpoint


def test_fingerprints(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of a small model, and any tensor of a large one, of which parts are read."""
    folder = shutil.copytree(place / "model", tmp_path / "model")
    last = [fingerprint(folder)]
    names = sorted(load_file(folder / "model.safetensors"))
    edit(folder, names[0], -1)
    last.append(fingerprint(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 1}))
    last.append(fingerprint(folder))
    monkeypatch.setattr(module_of_fingerprint, "WHOLE_BYTES", 0)
    monkeypatch.setattr(module_of_fingerprint, "BLOCK_BYTES", 16)
    last.append(fingerprint(folder))
    assert last[-1] == fingerprint(shutil.copytree(folder, tmp_path / "copy"))
    for name in names:
        tensors = {
            n: t * 1.01 if n == name else t for n, t in load_file(folder / "model.safetensors").items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        last.append(fingerprint(folder))
    assert len(set(last)) == len(last) == len(names) + 4


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
        (None, ["--data", "hub://acme"], "hub://acme: expected hub://owner/name"),
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
        "--request-timeout-seconds -1: at least 0": ["--request-timeout-seconds", "-1"],
        "--min-tokens-per-second 0: more than 0": ["--min-tokens-per-second", "0"],
    }
    for says, words in refused.items():
        with pytest.raises(SystemExit):
            evaluate.main([str(place / "model"), "--data", "x.jsonl", *words])
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "gpus", "loads", "devices"),
    [
        ("", 0, False, ()),
        ("", 8, False, (1,)),  # the first is this process's, which broadcasts
        ("--server-tensor-parallel-size 4", 8, False, (1, 2, 3, 4)),
        ("--servers-load", 1, True, (0,)),
        ("--servers-load --server-tensor-parallel-size 2", 2, True, (0, 1)),
        ("", 1, True, (0,)),  # implied
        ("--server-tensor-parallel-size 8", 8, True, tuple(range(8))),
        ("--url http://127.0.0.1:30000", 1, False, ()),
        ("--engine embedded", 1, False, ()),
    ],
)
def test_a_server_gets_no_gpu_that_the_broadcast_comes_from(
    place: Path, words: str, gpus: int, loads: bool, devices: tuple[int, ...]
) -> None:
    given = [str(place / "model"), "--data", "x.jsonl", "--engine", "sglang", *words.split()]
    options = evaluate.parse(given)
    placed = evaluation_run.place_servers(options, gpus)
    assert (placed.servers_load, placed.devices) == (loads, devices)
    assert ("--servers-load is implied" in placed.remark) == (loads and not options.servers_load)


def test_a_checkpoint_on_one_gpu_wants_another(place: Path, tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    assert convert_checkpoint.main(["import", str(place / "model"), str(target)]) == 0
    for words, gpus, says in (
        ([], 1, "--server-tensor-parallel-size 1: of 1 GPUs none is left for this process"),
        (["--server-tensor-parallel-size", "4"], 2, "--server-tensor-parallel-size 4: there are 2 GPUs"),
    ):
        options = evaluate.parse([str(target), "--data", "x.jsonl", "--engine", "sglang", *words])
        with pytest.raises(ValueError, match=says):
            evaluation_run.place_servers(options, gpus)
    assert evaluation_run.place_servers(options, 5).devices == (1, 2, 3, 4)


def test_every_stop_token_ends_a_sample_and_a_field_may_be_ignored(
    place: Path, whole: Path, tmp_path: Path, capsys: Capsys
) -> None:
    model, out = shutil.copytree(place / "model", place / "stops"), tmp_path / "out.jsonl"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "scale_depth": 1, "eos_token_id": 5}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 6]}))
    assert run(place, out, model="stops") == 2
    assert "config.json: scale_depth 1 has no counterpart" in capsys.readouterr().err
    ignore = ("--ignore-config-fields", "scale_depth")
    assert run(place, out, *ignore, "--stop-tokens", "abc", model="stops") == 2
    assert "error: --stop-tokens: 'abc' is 3 tokens of this model" in capsys.readouterr().err
    assert run(place, out, *ignore, "--stop-tokens", "7", "h", model="stops") == 0
    stops = {0, 6, 5, 7, ord("h") - ord("a") + 2}
    assert set(json.loads(out.read_text().splitlines()[0])["evaluation"]["stop_token_ids"]) == stops
    for short, long in zip(samples(out), samples(whole), strict=True):
        end = next((t + 1 for t, i in enumerate(long["token_ids"]) if i in stops), None)
        assert short["token_ids"] == long["token_ids"][:end]
        assert short["finish_reason"] == ("length" if end is None else "stop")
    # With other stops these are other samples; graded again they may be all the same.
    assert run(place, out, *ignore, model="stops") == 2
    assert "has samples of stop_token_ids = " in capsys.readouterr().err
    assert run(place, out, *ignore, "--regrade", model="stops", reward="letter") == 0
    assert set(json.loads(out.read_text().splitlines()[0])["evaluation"]["stop_token_ids"]) == stops
