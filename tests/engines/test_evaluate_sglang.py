"""tools/evaluate.py on a real server: the samples are those of the model it was given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import evaluate
from tiny import write_tokenizer

from megatron_dgpo.rollout.sglang.servers import ServerProcess

PROMPTS = ("abc", "1+2", "dog", "77", "a=b", "x.y,z")


def test_greedy_samples_are_those_of_the_embedded_engine(
    folders: dict[str, Path], servers: dict[str, ServerProcess], sglang_python: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(folders["qwen2"], tmp_path / "model")
    write_tokenizer(model)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "answer": "1"}) + "\n" for p in PROMPTS))
    sglang = ["--engine", "sglang"]
    engines = {
        "embedded": [],
        "broadcast": [*sglang, "--sglang-python", sglang_python],
        "servers' own": [*sglang, "--url", servers["qwen2"].url, "--servers-load"],
    }
    found = {}
    for name, more in engines.items():
        out, metrics = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json"
        words = [model, "--data", data, "--no-chat-template", "--k", 1, "--temperature", 0, "--out", out]
        words += ["--max-new-tokens", 12, "--reward", "exact_match", "--json", metrics, *more]
        assert evaluate.main([*map(str, words)]) == 0
        rows = [json.loads(line) for line in out.read_text().splitlines()][1:]
        found[name] = {row["question"]: (row["text"], row["token_ids"]) for row in rows}
        assert json.loads(metrics.read_text())["num_problems"] == len(PROMPTS)
    assert found["broadcast"] == found["servers' own"] == found["embedded"]
    assert set(found["embedded"]) == set(PROMPTS)
