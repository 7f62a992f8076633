"""tools/evaluate.py on a real server: the samples are those of the model it was given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import evaluate
import pytest
from tiny import write_tokenizer
from transformers import AutoTokenizer

from megatron_dgpo.rollout.sglang.servers import ServerProcess

PROMPTS = ("abc", "1+2", "dog", "77", "a=b", "x.y,z")


def test_greedy_samples_are_those_of_the_embedded_engine_and_end_alike(
    folders: dict[str, Path], servers: dict[str, ServerProcess], warm_python: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(folders["qwen2"], tmp_path / "model")
    write_tokenizer(model)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "answer": "1"}) + "\n" for p in PROMPTS))
    sglang = ["--engine", "sglang"]
    engines = {
        "without stops": [],
        "embedded": [],
        "broadcast": [*sglang, "--sglang-python", warm_python],
        "servers' own": [*sglang, "--url", servers["qwen2"].url, "--servers-load"],
    }
    # A coroutine cannot run where the answers come in, which is an event loop; it takes 0.2 s.
    rewards = {
        "without stops": "exact_match",
        "embedded": "exact_match",
        "broadcast": "user_rewards:judge",
        "servers' own": "user_rewards:judge",
    }
    found: dict[str, dict[str, tuple[str, list[int], str]]] = {}
    stops: list[int] = []
    for name, more in engines.items():
        if len(found) == 1:  # two ids that are drawn: one for the folder's list, one for the user's
            stops = [found["without stops"][prompt][1][at] for prompt, at in (("abc", 4), ("x.y,z", 3))]
            (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [stops[0], 0]}))
            user = ["--stop-tokens", AutoTokenizer.from_pretrained(model).convert_ids_to_tokens(stops[1])]
        out, metrics = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json"
        words = [model, "--data", data, "--no-chat-template", "--k", 1, "--temperature", 0, "--out", out]
        words += ["--max-new-tokens", 12, "--reward", rewards[name], "--json", metrics, *more]
        words += user if stops else []
        assert evaluate.main([*map(str, words)]) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()][1:]
        found[name] = {row["question"]: (row["text"], row["token_ids"], row["finish_reason"]) for row in rows}
        if rewards[name] == "user_rewards:judge":
            assert [row["reward"] for row in rows] == [float("1" in row["text"]) for row in rows]
        assert json.loads(metrics.read_text())["num_problems"] == len(PROMPTS)
    assert found["broadcast"] == found["servers' own"] == found["embedded"]
    assert set(found["embedded"]) == set(PROMPTS)
    for prompt, (_, ids, _) in found["without stops"].items():
        end = next((t + 1 for t, i in enumerate(ids) if i in (0, *stops)), None)
        text, until, reason = found["embedded"][prompt]
        assert until == ids[:end] and reason == ("length" if end is None else "stop")
        assert len(text) == len([i for i in until if i > 1]) - (until[-1] in stops)
    assert {reason for _, _, reason in found["embedded"].values()} == {"stop", "length"}


def test_a_server_that_takes_too_long_is_lost(
    folders: dict[str, Path],
    servers: dict[str, ServerProcess],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = shutil.copytree(folders["qwen2"], tmp_path / "model")
    write_tokenizer(model)
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "abc", "answer": "1"}) + "\n")
    words = [
        model,
        "--data",
        tmp_path / "data.jsonl",
        "--no-chat-template",
        "--k",
        1,
        "--out",
        tmp_path / "o.jsonl",
    ]
    words += [
        "--engine",
        "sglang",
        "--url",
        servers["qwen2"].url,
        "--servers-load",
        "--reward",
        "exact_match",
    ]
    words += ["--max-new-tokens", 12]
    assert evaluate.main([*map(str, words), "--request-timeout-seconds", "0.0001"]) == 3
    said = capsys.readouterr().err
    assert f"error: no SGLang server is left: {servers['qwen2'].url}" in said
    assert f"0 of 1 problems are done and in {tmp_path}/o.jsonl, from which the same command goes on" in said
    assert evaluate.main([*map(str, words)]) == 0
