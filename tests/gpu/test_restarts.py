"""A run whose ranks form NCCL groups goes on when torchrun starts it again. Needs two CUDA devices."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from launch import Launch
from tiny import write_model, write_tokenizer

from megatron_dgpo.observe.metrics import read_metrics

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices (make test-gpu)", allow_module_level=True)

CONFIG = """
[model]
path = "{0}/model"
[run]
folder = "{0}/run"
[parallel]
device = "cuda"
tensor_model_parallel_size = 2
timeout_seconds = 300
[data]
train = ["{0}/data.jsonl"]
apply_chat_template = false
max_prompt_tokens = 16
[rollout]
max_new_tokens = 24
[reward]
name = "exact_match"
[train]
steps = 3
prompts_per_step = 4
samples_per_prompt = 4
prompts_per_minibatch = 4
[optimizer]
lr = 1e-3
[checkpoint]
every = 1
"""


def test_a_rank_that_is_killed_costs_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank waits for it in a collective of NCCL's: torchrun ends that one before its time-out."""
    write_tokenizer(write_model(tmp_path / "model", tied=True))
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(16)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(CONFIG.format(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("DIES", json.dumps([(1, "update", 2), (0, "sync", 3)]))
    words = [tmp_path / "run.toml"]
    run = Launch("dies", 2, words, tmp_path / "log", cold=True, max_restarts=2).succeed()
    assert [row["step"] for row in read_metrics(tmp_path / "run", "train")] == [1, 2, 3]
    assert [n for n in (1, 2) if f"step_{n:08d}: {n} steps done" in run.output] == [1, 2]
