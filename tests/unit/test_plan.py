"""What a dry run says a run will do."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import patience
from tiny import write_model, write_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_dgpo.cli import ConfigError, load, validate
from megatron_dgpo.config import Config, SFTConfig
from megatron_dgpo.entry import parse
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
    text = "\n".join(plan(recipe("qwen2.5-math-7b"), 4, hf("qwen2.5-math-7b"), local=4))
    assert "ranks: 4 = tensor 4 x pipeline 1 x context 1 x data 1" in text
    assert "512 prompts x 16 = 8,192 samples; 8,192 a replica, 2,048 a rank" in text
    assert "64 prompts = 1,024 samples, 1,024 a replica; 8 updates a step, 1,600 in 200 steps" in text
    assert "at most 4,090 a sample, 33,505,280 a step, 33,505,280 a replica" in text
    assert "2 SGLang servers of 2 GPUs, started on this machine on GPUs 4, 5, 6, 7" in text
    # 7.6156e9 / 4 parameters: 2, 4 and 12 bytes of each.
    assert "about 3.55 GiB of weights, 7.09 of gradients and 21.3 of Adam's state: 31.9 GiB" in text


def test_memory_disk_and_time_of_the_32b_recipe() -> None:
    """32.764e9 parameters on 16 ranks a replica: 14 bytes of each in a checkpoint, 2 in the reference."""

    def text(**sections: Any) -> str:
        return "\n".join(plan(recipe("qwen2.5-32b", **sections), 32, hf("qwen2.5-32b"), local=8))

    said = text()
    assert "checkpoints: 459 GB every 10 steps, at most 4 at a time: 1,835 GB of disk" in said
    assert "write 1 GB/s a save takes 459 s" in said and "a rank may write for 3,600 s" in said
    assert "host memory of a save: what a rank writes, 13.3 GiB, and 107 on a machine with 8 ranks" in said
    assert "reference: 3.81 GiB more a rank on GPUs of 62 GiB and more, else 7.63 GiB of host memory" in said
    assert "a rank, 61 a machine" in said and "hidden states" not in said
    # 8,192 samples on 2 replicas, of 18,432 tokens, 5,120 numbers of 2 bytes, shared by 8 ranks.
    assert "reference: up to 90 GiB of its hidden states" in text(algorithm={"credit_timing": "update"})
    assert "reference" not in text(algorithm={"name": "grpo"})
    assert "reference: 7.63 GiB of host memory a rank" in text(model={"reference_placement": "host"})
    all_kept = text(algorithm={"name": "ppo"}, checkpoint={"keep_last": 0, "every": 50})
    assert "checkpoints: 917 GB every 50 steps, at most 4 at a time: 3,670 GB" in all_kept
    last = text(checkpoint={"every": 0}, parallel={"device": "cpu"})
    assert (
        "checkpoints: 459 GB at the end, at most 1 at a time: 458.7 GB" in last and "host memory" not in last
    )


def test_servers_have_the_gpus_after_the_trainers() -> None:
    def engine(local: int, **sglang: Any) -> str:
        launch = {"count": 2, "tensor_parallel_size": 2}
        changed = recipe("quickstart", rollout={"engine": "sglang", "sglang": {"launch": launch, **sglang}})
        return next(x for x in plan(changed, 8, None, local=local) if x.startswith("engine: "))

    servers = "2 SGLang servers of 2 GPUs, started on"
    assert engine(4).endswith(f"{servers} each of 2 machines on GPUs 4, 5, 6, 7")
    assert engine(8).endswith(f"{servers} this machine on GPUs 8, 9, 10, 11")
    assert engine(4, colocate=True).endswith("on GPUs 0, 1, 2, 3, which the trainer uses too")


def test_plan_of_sampling_and_engines() -> None:
    small = recipe("qwen2.5-32b", rollout={"dynamic_sampling": True, "oversampling": 1.25, "max_rounds": 4})
    text = "\n".join(plan(small, 32, None, local=8))
    assert "8,192 samples, of 10,240 drawn, in up to 4 draws until enough groups differ" in text
    assert "SGLang servers at http://server-0:30000, http://server-1:30000" in text and "weights" not in text
    embedded = recipe("quickstart", rollout={"engine": "embedded"})
    assert "engine: in every training process" in "\n".join(plan(embedded, 2, None, local=2))


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: str(f.relative_to(EXAMPLES)))
@pytest.mark.parametrize("algorithm", ["dgpo", "grpo", "dapo", "dapo_dgpo", "ppo"])
def test_every_recipe_runs_dry(
    file: Path, algorithm: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without weights, tokenizer, data and GPU, with the sizes of some model."""
    monkeypatch.setenv("WORLD_SIZE", {"qwen2.5-math-7b": "4", "qwen2.5-32b": "32"}.get(file.parent.name, "2"))
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


# --- as a user runs them dry ------------------------------------------------------------------------------


def dry(words: list[str], capsys: pytest.CaptureFixture[str], schema: Any = Config) -> str:
    """What `python -m megatron_dgpo.train words... --dry-run` prints, or sft with its schema."""
    with pytest.raises(SystemExit) as caught:
        parse([*words, "--dry-run"], schema)
    printed = capsys.readouterr()
    assert caught.value.code == 0, printed.err
    return printed.out


@pytest.mark.parametrize(
    ("name", "ranks", "engine"),
    [
        ("qwen2.5-math-7b", 4, "on GPUs 4, 5, 6, 7"),
        ("qwen2.5-32b", 16, "servers of 4 GPUs, started on each of 4 machines on GPUs 4, 5, 6, 7"),
    ],
)
def test_the_recipes_scripts_run_dry(
    name: str,
    ranks: int,
    engine: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the command that run.sh gives to python, at its own number of ranks."""
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$WORLD_SIZE" "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DRY_RUN": "1"}
    for variable in ("MODEL", "DATA", "HELDOUT", "NPROC", "NNODES", "SERVERS", "ALGORITHM"):
        environment.pop(variable, None)
    said = subprocess.check_output(
        ["bash", str(EXAMPLES / name / "run.sh")], env=environment, timeout=patience()
    )
    world_size, *words = said.decode().split("\0")[:-1]
    assert int(world_size) == ranks and words[:2] == ["-m", "megatron_dgpo.train"]
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # as both scripts start it
    monkeypatch.chdir(EXAMPLES.parent)
    words = [w for w in words[2:] if w != "--dry-run"]
    text = dry(words, capsys)
    assert f"# ranks: {ranks} = " in text and engine in text and "# not there yet: data.train: " in text
    if name == "qwen2.5-math-7b":  # as NPROC=8 starts it
        monkeypatch.setenv("WORLD_SIZE", "8")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
        with pytest.raises(SystemExit):
            parse([*words, "--dry-run"], Config)
        assert "error: rollout.sglang.launch.devices: 4 is the trainer's, whose 8 " in capsys.readouterr().err


def test_the_custom_algorithm_runs_dry(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    monkeypatch.setenv("WORLD_SIZE", "2")
    files = ["examples/quickstart/dgpo.toml", "examples/custom_algorithm/algorithm.toml"]
    model = str(EXAMPLES / "qwen2.5-math-7b" / "model")
    text = dry([*files, "--model.path", model], capsys)
    assert 'name = "examples.custom_algorithm.cispo:Cispo"' in text and "# ranks: 2 = tensor 2" in text


def test_a_dry_run_reads_the_data_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    model = write_tokenizer(write_model(tmp_path / "model", tied=True))
    rows = [
        {"prompt": "1+2=", "answer": "3"},
        {"prompt": "1+2+3=", "answer": "6"},
        {"prompt": "4" * 30, "answer": "4"},
    ]
    data, heldout = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    heldout.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0]) + "\n")
    words = [
        str(EXAMPLES / "quickstart/dgpo.toml"),
        "--model.path",
        str(model),
        "--data.max_prompt_tokens",
        "20",
    ]
    words += ["--parallel.tensor_model_parallel_size", "1", "--rollout.max_new_tokens", "40"]
    words += ["--run.folder", str(tmp_path / "run"), "--data.apply_chat_template", "false"]
    words += ["--data.train", f'["{data}"]', "--evaluation.data", f'["{heldout}"]']
    small = ["--train.prompts_per_step", "2", "--train.prompts_per_minibatch", "2"]

    text = dry([*words, *small], capsys)
    assert "# data.train: 3 rows in 1 of 1 sources" in text
    assert "# data.train: 2 prompts that are used, of 4 to 6 tokens, 5.0 in the mean" in text
    assert "# evaluation.data: 2 rows in 1 of 1 sources" in text
    assert "# evaluation.data: 1 problems that are used, of 4 to 4 tokens" in text
    # What is there does not have to be enough, or right, to be refused before the run.
    for more, says in (
        ([], "error: train.prompts_per_step: 32 is more than the 2 rows of data.train"),
        ([*small, "--data.answer_key", "gold"], f"error: {data}, row 1: "),
    ):
        with pytest.raises(SystemExit) as caught:
            parse([*words, *more, "--dry-run"], Config)
        assert caught.value.code == 2 and says in capsys.readouterr().err
    # Without one of the files, and then without the tokenizer.
    some = ["--data.train", f'["{data}", "none.jsonl", "hub://a/b"]']
    text = dry([*words, *some], capsys)
    assert "# data.train: 3 rows in 1 of 3 sources" in text and "none.jsonl is not a file" in text
    assert (
        "# data.train: hub://a/b?split=train is not looked at by a dry run" in text
        and "that are used" not in text.split("# eval")[0]
    )
    (model / "tokenizer.json").unlink()
    text = dry(words, capsys)
    assert "# data.train: how long they are in tokens is not known without the tokenizer" in text
    assert not (tmp_path / "run").exists()


def test_a_supervised_dry_run_reads_its_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    model = write_tokenizer(write_model(tmp_path / "model", tied=True))
    data = tmp_path / "sft.jsonl"
    data.write_text("".join(json.dumps({"prompt": "1+2=", "response": "3" * n}) + "\n" for n in (1, 5)))
    words = [str(EXAMPLES / "quickstart/sft.toml"), "--model.path", str(model), "--data.max_tokens", "40"]
    words += ["--parallel.tensor_model_parallel_size", "1", "--rollout.max_new_tokens", "40"]
    words += ["--run.folder", str(tmp_path / "run"), "--data.apply_chat_template", "false"]
    words += ["--data.train", f'["{data}"]', "--train.batch_size", "2"]
    text = dry(words, capsys, SFTConfig)
    assert "# data.train: 2 rows in 1 of 1 sources" in text
    assert "# data.train: 2 examples that are used, of 6 to 10 tokens, 8.0 in the mean" in text  # with <eos>
