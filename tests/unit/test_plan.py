"""What a dry run says a run will do."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_dgpo.cli import ConfigError, load, validate
from megatron_dgpo.config import Config, SFTConfig
from megatron_dgpo.plan import num_parameters, plan

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = [p for p in sorted(EXAMPLES.rglob("*.toml")) if "[model]" in p.read_text()]
SMALL: dict[str, Any] = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=101,
    max_position_embeddings=64,
)


def hf(recipe: str) -> dict[str, Any]:
    return json.loads((EXAMPLES / recipe / "model" / "config.json").read_text())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "family, more", [("qwen2", {}), ("qwen3", {"head_dim": 16}), ("llama", {}), ("llama", {"head_dim": 12})]
)
def test_number_of_parameters(family: str, more: dict[str, Any], tied: bool) -> None:
    given = {**SMALL, **more, "tie_word_embeddings": tied}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given))
    assert num_parameters({"model_type": family, **given}) == sum(p.numel() for p in model.parameters())


def test_the_papers_models() -> None:
    """As their model cards count them: 7.61 and 32.5 billion, the latter with its embeddings 32.8."""
    assert num_parameters(hf("qwen2.5-math-7b")) == 7_615_616_512
    assert num_parameters(hf("qwen2.5-32b")) == 32_763_876_352


def recipe(name: str, **sections: dict[str, Any]) -> Config:
    raw = tomllib.loads((EXAMPLES / name / "dgpo.toml").read_text())
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    return validate(raw, Config)


def test_plan_of_the_7b_recipe() -> None:
    text = "\n".join(plan(recipe("qwen2.5-math-7b"), 8, hf("qwen2.5-math-7b")))
    assert "ranks: 8 = tensor 4 x pipeline 1 x context 1 x data 2" in text
    assert "512 prompts x 16 = 8,192 samples; 4,096 a replica, 1,024 a rank" in text
    assert "64 prompts = 1,024 samples, 512 a replica; 8 updates a step, 1,600 in 200 steps" in text
    assert "at most 4,090 a sample, 33,505,280 a step, 16,752,640 a replica" in text
    assert "2 SGLang servers of 2 GPUs, started on rank 0's machine on GPUs 4, 5, 6, 7" in text
    # 7.6156e9 / 4 parameters: 2 and 4 bytes of each, and 12 of every second one.
    assert "about 3.55 GiB of weights, 7.09 of gradients and 10.6 of Adam's state: 21.3 GiB" in text


def test_plan_of_sampling_and_engines() -> None:
    small = recipe("qwen2.5-32b", rollout={"dynamic_sampling": True, "oversampling": 1.25, "max_rounds": 4})
    text = "\n".join(plan(small, 32, None))
    assert "8,192 samples, of 10,240 drawn, in up to 4 draws until enough groups differ" in text
    assert "SGLang servers at http://server-0:30000, http://server-1:30000" in text and "weights" not in text
    embedded = recipe("quickstart", rollout={"engine": "embedded"})
    assert "engine: in every training process" in "\n".join(plan(embedded, 2, None))


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: str(f.relative_to(EXAMPLES)))
@pytest.mark.parametrize("algorithm", ["dgpo", "grpo", "dapo", "dapo_dgpo", "ppo"])
def test_every_recipe_runs_dry(
    file: Path, algorithm: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without weights, tokenizer, data and GPU, with the sizes of some model."""
    monkeypatch.setenv("WORLD_SIZE", {"qwen2.5-math-7b": "8", "qwen2.5-32b": "64"}.get(file.parent.name, "2"))
    schema: Any = SFTConfig if "sft" in file.stem else Config
    words = [str(file), "--dry-run"]
    if schema is Config:
        words += ["--algorithm.name", algorithm]
    model = file.parent / "model"
    words += ["--model.path", str(model if model.is_dir() else EXAMPLES / "qwen2.5-math-7b" / "model")]
    with pytest.raises(SystemExit) as caught:
        load(words, schema)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert schema is SFTConfig or "# ranks: " in out and "# weights: " in out
    assert "# not there yet: model.path: " in out
    monkeypatch.setenv("WORLD_SIZE", "12")
    with pytest.raises(ConfigError, match="parallel: 12 processes do not divide into replicas of (8|16)"):
        load([*words, "--parallel.tensor_model_parallel_size", "8"], schema)
