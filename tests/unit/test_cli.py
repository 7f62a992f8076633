"""Files and a command line to a config: what is composed, overridden, printed."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from patience import patience

from megatron_dgpo import cli
from megatron_dgpo.cli import ConfigError, compose, dump_toml, help_text, keys, load, load_or_exit, validate
from megatron_dgpo.config import Config, SFTConfig

MODEL = """{"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
"hidden_size": 32, "intermediate_size": 64, "vocab_size": 16, "max_position_embeddings": 256}"""
CONFIG = """
[model]
path = "{0}/model"
init = "random"
[data]
train = ["{0}/train.jsonl"]
max_prompt_tokens = 32
[rollout]
max_new_tokens = 32
[reward]
name = "exact_match"
[train]
steps = 3
prompts_per_step = 4
samples_per_prompt = 2
prompts_per_minibatch = 2
[optimizer]
lr = 1e-3
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config that passes every check."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(MODEL)
    (tmp_path / "model" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 15}}}')
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(tmp_path))
    return str(path)


def composed(*words: str) -> dict[str, Any]:
    raw, problems = compose(words, Config)
    assert problems == []
    return raw


# --- files and overrides ----------------------------------------------------------------------------


def test_files_go_left_to_right_and_overrides_last(tmp_path: Path) -> None:
    first, second = tmp_path / "1.toml", tmp_path / "2.toml"
    first.write_text(
        '[train]\nsteps = 1\nprompts_per_step = 8\n[model]\npath = "m"\ntransformer = {a = 1, b = 2}'
    )
    second.write_text("[train]\nsteps = 2\n[model.transformer]\nb = 3")
    raw = composed(str(first), str(second))
    assert raw["train"] == {"steps": 2, "prompts_per_step": 8}
    assert raw["model"] == {"path": "m", "transformer": {"a": 1, "b": 3}}
    assert composed(str(second), str(first))["train"]["steps"] == 1
    # An override wins wherever it stands, and the last one of two.
    assert composed("--train.steps", "5", str(first), str(second))["train"]["steps"] == 5
    assert composed(str(first), "--train.steps", "5", "--train.steps", "6")["train"]["steps"] == 6


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--train.steps", "7"], "train.steps", 7),
        (["--train.steps=7"], "train.steps", 7),
        (["--optimizer.lr", "1e-4"], "optimizer.lr", 1e-4),
        (["--optimizer.lr", "-0.5"], "optimizer.lr", -0.5),
        (["--run.seed", "-3"], "run.seed", -3),
        (["--optimizer.lr", "nan"], "optimizer.lr", pytest.approx(float("nan"), nan_ok=True)),
        (["--run.quiet", "true"], "run.quiet", True),
        (["--run.quiet", "false"], "run.quiet", False),
        (["--run.quiet"], "run.quiet", True),
        (["--run.quiet", "--train.steps", "7"], "run.quiet", True),
        (["--quiet"], "run.quiet", True),
        (["--resume"], "run.resume", True),
        (["--resume", "false"], "run.resume", False),
        (["--resume=false"], "run.resume", False),
        (["--data.train", '["a.jsonl", "b c.parquet"]'], "data.train", ["a.jsonl", "b c.parquet"]),
        (["--evaluation.data", "[]"], "evaluation.data", []),
        (["--model.transformer", "{a = 1}"], "model.transformer", {"a": 1}),
        (["--model.transformer.a", "1"], "model.transformer", {"a": 1}),
        (["--model.path", "some/folder"], "model.path", "some/folder"),
        (["--model.path", "'some folder'"], "model.path", "some folder"),
        (["--model.path=a=b"], "model.path", "a=b"),
        (["--reward.name", "hash_answer"], "reward.name", "hash_answer"),
        (["--run.folder", "7"], "run.folder", "7"),
        (["--run.folder", "2026-01-31"], "run.folder", "2026-01-31"),
        (["--run.folder", "true"], "run.folder", "true"),
        (["--data.system_prompt", "- 1.5 -"], "data.system_prompt", "- 1.5 -"),
        (["--data.system_prompt=--x"], "data.system_prompt", "--x"),
        (["--data.system_prompt", ""], "data.system_prompt", ""),
        (["--data.system_prompt", "1\ny = 2"], "data.system_prompt", "1\ny = 2"),
    ],
)
def test_values_of_overrides(words: list[str], key: str, value: Any) -> None:
    raw = composed(*words)
    section, _, name = key.partition(".")
    assert raw[section] == {name: value}
    assert type(raw[section][name]) is type(value) or not isinstance(value, (bool, int, str))


def test_short_names_before_the_file(file: str) -> None:
    config = load(["--resume", "--quiet", file], Config)
    assert config.run.resume and config.run.quiet and config.train.steps == 3
    config = load(["--quiet", file], Config)
    assert config.run.quiet and not config.run.resume and config.train.steps == 3


def test_text_without_a_value() -> None:
    assert compose(["--run.folder", "--resume"], Config)[1] == ["run.folder: needs a value after it"]


def test_a_value_is_not_a_section() -> None:
    _, problems = compose(["--train.steps", "3", "--train.steps.more", "4"], Config)
    assert problems == ["train.steps.more: steps is not a section"]


def test_typed_values_reach_the_config(file: str) -> None:
    words = ["--optimizer.lr=3e-4", "--rollout.temperature", "2", "--algorithm.name", "grpo", "--resume"]
    config = load([file, *words, "--run.folder", "2026-01-31", "--train.steps", "9"], Config)
    assert config.optimizer.lr == 3e-4 and config.rollout.temperature == 2.0
    assert config.algorithm.name == "grpo" and config.run.resume
    assert config.run.folder == Path("2026-01-31") and config.train.steps == 9


def test_world_size_is_torchruns(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 data-parallel replicas"):
        load([file], Config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    load([file], Config)


def test_all_problems_are_told_at_once(file: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([file, "--train.steps", "x", "--optimizer.lr", "0", "--run.sead", "1"], Config)
    assert {p.partition(":")[0] for p in caught.value.problems} == {"train.steps", "optimizer.lr", "run.sead"}
    # Checks of the caller stand first, and speak for a key alone.
    with pytest.raises(ConfigError) as caught:
        words = [file, "--parallel.context_parallel_size", "2", "--model.path", "nowhere"]
        load(words, Config, extra_checks=[lambda c: [f"model.path: {c.model.path} is bad"]], world_size=2)
    assert [p.partition(":")[0] for p in caught.value.problems] == [
        "model.path",
        "parallel.context_parallel_size",
    ]


# --- help and dry run -------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [Config, SFTConfig])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_key_once(schema: Any, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_or_exit(["not-there.toml", flag], schema)
    assert caught.value.code == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = [words[0][2:] for words in lines if words and words[0].startswith("--") and "." in words[0]]
    wanted = [key for key, *_ in keys(schema) if "." in key]
    assert [name for name in shown if not name.startswith("resume")] == wanted
    assert len(set(wanted)) == len(wanted) > 40
    assert "--ddp" in [words[0] for words in lines if words]


def test_help_shows_type_and_default_of_what_it_names() -> None:
    text = help_text(Config)
    for line in (
        "--algorithm.name  <dgpo | grpo | dapo | dapo_dgpo | gspo | dr_grpo | reinforce | ppo | text>",
        "--algorithm.tau  <number | auto>  (1.0)",
        "--algorithm.kl_coef  <number>  (0.0)",
        "--train.steps  <integer>  (required)",
        "--data.train  <list of texts>  (required)",
        '--run.folder  <path>  ("runs/default")',
        "--run.resume  <true/false>  (false)",
        '--model.init  <weights | random>  ("weights")',
    ):
        assert line in text
    assert "megatron_dgpo.sft" in help_text(SFTConfig) and "megatron_dgpo.train" in text


def test_dry_run_prints_the_resolved_config(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_or_exit([file, "--dry-run", "--algorithm.tau", "0.25"], Config)
    assert caught.value.code == 0
    printed = validate(tomllib.loads(capsys.readouterr().out), Config)
    assert printed == load([file, "--algorithm.tau", "0.25"], Config)
    assert printed.algorithm.tau == 0.25 and not printed.run.folder.exists()


def test_dry_run_makes_the_checks(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_or_exit([file, "--dry-run", "--parallel.sequence_parallel", "true"], Config)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: parallel.sequence_parallel: ")


def test_a_file_of_dumped_settings_loads(file: str, tmp_path: Path) -> None:
    config = load([file, "--algorithm.kappa", "0"], Config)
    (tmp_path / "again.toml").write_text(dump_toml(config))
    assert load([str(tmp_path / "again.toml")], Config) == config


# --- who speaks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "local", "torchrun", "waits", "said"),
    [
        (0, 0, True, [], "error: k: wrong\n"),
        (0, 0, False, [], "error: k: wrong\n"),
        (1, 1, False, [], ""),
        (1, 1, True, [40.0], "error: [rank 1] k: wrong\n"),
        (8, 0, True, [20.0], "error: [rank 8] k: wrong\n"),
    ],
)
def test_rank_0_speaks_first(
    rank: int, local: int, torchrun: bool, waits: list[float], said: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Other ranks wait for torchrun to end them: had they failed first, it would end rank 0 unheard."""
    slept: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as caught, cli.refusals():
        raise ConfigError(["k: wrong"])
    assert caught.value.code == 2
    assert slept == waits and capsys.readouterr().err == said
    assert "k: wrong" in (tmp_path / "error.json").read_text()


def test_one_line_for_a_bad_file_and_none_for_a_mistake_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    with pytest.raises(SystemExit), cli.refusals():
        raise ValueError("a.jsonl, row 3:\n  two lines")
    assert capsys.readouterr().err == "error: a.jsonl, row 3: two lines\n"
    with pytest.raises(KeyError), cli.refusals():
        raise KeyError("a programming mistake keeps its traceback")


def test_settings_are_read_without_torch() -> None:
    """A wrong setting can be refused fast."""
    import subprocess

    code = "import sys, megatron_dgpo.cli; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=patience(), env=environment)
