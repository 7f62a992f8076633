"""parallel.device on machines with GPUs. Each case is a process in which torch says that it sees some (those
that CUDA_VISIBLE_DEVICES leaves), as a build with CUDA would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import patience
from place import TORCHRUN
from tiny import write_model, write_tokenizer

from megatron_dgpo import platform

ROOT = Path(__file__).resolve().parents[2]
FAKED = """
import os, runpy, sys
import torch
gpus = int(sys.argv.pop(1))
def count():
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if visible is None else len([name for name in visible.split(",") if name])
torch.cuda.device_count = count
torch.cuda.is_available = lambda: count() > 0
sys.argv.pop(0)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run(gpus: int, words: list[object], **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m words...` on a machine with so many GPUs."""
    env = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-W", "ignore", "-c", FAKED, str(gpus), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=patience())


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Of a run of one step."""
    folder = tmp_path_factory.mktemp("device")
    write_tokenizer(write_model(folder / "model", tied=True, num_hidden_layers=1))
    rows = [{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("megatron_dgpo.train", "--model.path", folder / "model"),
        *("--data.train", json.dumps([str(folder / "rows.jsonl")]), "--data.apply_chat_template", "false"),
        *("--reward.name", "hash_answer", "--rollout.max_new_tokens", "4", "--optimizer.lr", "1e-3"),
        *("--train.steps", "1", "--train.prompts_per_step", "2", "--train.prompts_per_minibatch", "2"),
        *(
            "--train.samples_per_prompt",
            "2",
            "--data.max_prompt_tokens",
            "16",
            "--checkpoint.export_hf",
            "false",
        ),
    ]


RANKS = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
"""What torchrun tells the first of two ranks."""
SERVER = ["--rollout.engine", "sglang", "--rollout.sglang.launch.python", sys.executable]


def refusal(gpus: int, words: list[object], **environment: str) -> str:
    """The one line with which the command ends, before process groups exist: MASTER_ADDR is not even set."""
    done = run(gpus, words, **environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("error: ").rstrip()


def test_more_ranks_than_gpus_are_refused(settings, tmp_path):
    assert refusal(1, [*settings, "--run.folder", tmp_path / "run"], **RANKS) == (
        "parallel.device: 'auto' gives each rank a GPU of its own, and this machine has 2 ranks and 1 GPU; "
        "start at most 1 here, or use 'cpu'"
    )
    assert not (tmp_path / "run").exists()


def test_a_server_without_a_gpu_is_refused(settings, tmp_path):
    assert refusal(2, [*settings, "--run.folder", tmp_path / "run", *SERVER], **RANKS) == (
        "rollout.sglang.launch: with the servers this machine needs 3 GPUs, and has 2; use fewer servers or "
        "ranks, or rollout.sglang.colocate"
    )


def test_tools_refuse_more_ranks_than_gpus(tmp_path):
    words = ["convert_checkpoint", "verify", tmp_path, tmp_path, "--tensor-model-parallel-size", "2"]
    assert refusal(1, words, PYTHONPATH=f"{ROOT}:{ROOT / 'tools'}") == (
        "--device: 'auto' gives each rank a GPU of its own, and this machine has 2 ranks and 1 GPU; start at "
        "most 1 here, or use 'cpu'"
    )


def test_a_gpu_that_is_asked_for_and_not_there_is_refused():
    with pytest.raises(ValueError, match=r"^parallel\.device: 'cuda' needs a GPU, and torch .* finds none"):
        platform.use_device("cuda", 1)
    platform.use_device("auto", 8)  # on the CPU, where ranks share cores


def test_gpus_count_as_far_as_they_are_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    platform.use_device("cuda", 2)
    with pytest.raises(ValueError, match="this machine has 3 ranks and 2 GPUs; start at most 2 here"):
        platform.use_device("cuda", 3)


def test_a_run_on_the_cpu_leaves_gpus_alone(settings, tmp_path):
    """Whoever touched one would fail: this torch has no CUDA."""
    words = [*settings, "--run.folder", tmp_path / "run", "--parallel.device", "cpu"]
    done = run(2, words)
    assert done.returncode == 0, done.stderr
    assert "on the CPU: Megatron-Core runs on CPU tensors and gloo" in done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "grad_norm" in row] == [1]


@pytest.mark.parametrize(
    ("device", "gpus", "engine", "nproc"),
    [
        ("", 1, "embedded", 2),
        ("cuda", 1, "embedded", 1),
        ("cuda", 8, "embedded", 2),
        ("cuda", 2, "sglang", 1),
    ],
)
def test_the_quick_start_asks_for_what_the_machine_has(device, gpus, engine, nproc, tmp_path):
    """On the CPU unless it is told otherwise. Stand-ins for python and torchrun note what they are asked."""
    stand_in = tmp_path / "bin" / "torchrun"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "bin" / "python").write_text(f"#!/bin/sh\necho {gpus}\n")
    for path in stand_in.parent.iterdir():
        path.chmod(0o755)
    env = {**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}", "QUICKSTART_OUT": str(tmp_path)}
    env |= {"QUICKSTART_ENGINE": engine, **({"QUICKSTART_DEVICE": device} if device else {})}
    script = ["bash", str(ROOT / "examples/quickstart/run.sh")]
    subprocess.run(script, env=env, check=True, capture_output=True, timeout=patience())
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2
    for words in asked:
        assert f"--nproc-per-node {nproc} " in words
        assert f"--parallel.device {device or 'cpu'} " in words
        assert f"--parallel.tensor_model_parallel_size {nproc} " in words


def test_float32_is_float32_where_the_environment_allows_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here and in processes that this one starts; and Megatron's order of kernels on GPUs."""
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # what torch starts with under that variable
    assert torch.backends.cuda.matmul.allow_tf32
    try:
        platform.use_device("auto", 1)
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    assert os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] == "0"
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
