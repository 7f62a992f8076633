"""Weights into real SGLang servers on GPUs: by NCCL, and through CUDA IPC. Needs a CUDA device and SGLang in
.venv-sglang (or SGLANG_PYTHON names its interpreter); the broadcast needs a second device."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from patience import patience
from tiny import write_model

from megatron_dgpo import platform
from megatron_dgpo.config import LaunchConfig, ParallelConfig, SGLangConfig, SyncConfig
from megatron_dgpo.learner import score_sequences
from megatron_dgpo.mcore.hf_config import ModelShape
from megatron_dgpo.mcore.model import build_model
from megatron_dgpo.mcore.policy import Frozen
from megatron_dgpo.rollout.engine import SamplingParams
from megatron_dgpo.rollout.sglang.engine import SGLangEngine
from megatron_dgpo.rollout.sglang.fleet import Fleet
from megatron_dgpo.types import Prompt
from megatron_dgpo.weights import convert
from megatron_dgpo.weights.sync import WeightSync

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device (make test-gpu)", allow_module_level=True)
PYTHON = Path(os.environ.get("SGLANG_PYTHON", Path(__file__).parents[2] / ".venv-sglang" / "bin" / "python"))
if not PYTHON.is_file():
    pytest.skip(f"SGLang is not installed: {PYTHON} is not there", allow_module_level=True)

# Heads that every attention backend takes.
SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
PROMPTS = [Prompt(f"p{i}", tuple(range(i + 1, i + 40)), "", "") for i in range(4)]


def synced(config: SGLangConfig, folder: Path, logs: Path, device: str = "cuda") -> list[float]:
    """The probe's gaps after three syncs: on prompts, and on what the server drew; before the last it rests
    where it is colocated. The group for weights is left and formed again in between."""
    dtype, shape = torch.bfloat16, ModelShape.from_folder(folder)
    gaps = []
    parallel = ParallelConfig(device=device, timeout_seconds=patience(1800))  # type: ignore[arg-type]
    with platform.distributed(parallel, seed=1) as groups:
        model = build_model(shape, ParallelConfig(), groups, params_dtype=dtype)
        convert.load_folder(model, groups, folder)
        fleet = Fleet(config, groups, model_path=folder, dtype="bfloat16", log_folder=logs)
        engine = SGLangEngine(
            fleet,
            groups,
            config,
            SyncConfig(),
            decode=str,
            vocab_size=shape.vocab_size,
            max_positions=shape.max_positions,
        )
        try:
            score = partial(score_sequences, Frozen(model, groups), max_tokens=4096)
            sync = WeightSync(model, groups, engine, SyncConfig(bucket_bytes=1 << 20), score, PROMPTS)
            for version in (1, 2, 3):
                gap = sync.push(version)
                assert gap is not None
                gaps.append(gap.mean)
                drawn = engine.generate(PROMPTS, SamplingParams(max_new_tokens=32, n=2))
                samples = [s for g in drawn if g is not None for s in g.samples]
                assert {v.version for s in samples for v in s.weight_versions} == {version}
                sync.probe_with([g for g in drawn if g is not None])
                if version == 1:
                    engine._disconnect()
                engine.rest()
        finally:
            engine.close()
    return gaps


def launch(**more: object) -> LaunchConfig:
    args = {"mem_fraction_static": 0.3, "enable_fp32_lm_head": True}
    return LaunchConfig(python=PYTHON, args=args, startup_timeout_seconds=patience(1200), **more)  # type: ignore[arg-type]


def test_a_colocated_server_opens_the_trainers_memory(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tied=False, dtype=torch.bfloat16, **SIZES)
    gaps = synced(SGLangConfig(colocate=True, launch=launch()), folder, tmp_path)
    assert len(gaps) == 3  # each below the bound, or the sync had raised


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes no two members of a group on one GPU")
def test_a_server_on_another_gpu_gets_the_weights_by_nccl(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tied=False, dtype=torch.bfloat16, **SIZES)
    gaps = synced(SGLangConfig(launch=launch(devices=(1,))), folder, tmp_path)
    assert len(gaps) == 3  # each below the bound, or the sync had raised
