"""What is refused before anything is built, and in which words.

One line a problem on stderr, naming the key (or file and row) and what would be right; status 2.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from launch import ROOT, Launch

EXAMPLES = ROOT / "examples" / "quickstart"
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE")


class Place:
    """A folder with the quick start's data and model folder, and command lines that name them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.model = folder, folder / "data", folder / "model"

    def words(self, module: str, *more: object) -> list[str]:
        """A command line that passes every check, and then `more`."""
        rows = self.data / ("train.jsonl" if module == "train" else "sft.jsonl")
        words = [
            EXAMPLES / ("dgpo.toml" if module == "train" else "sft.toml"),
            "--run.folder",
            self.folder / "run",
        ]
        words += ["--model.path", self.model, "--model.init", "random", "--data.train", f'["{rows}"]']
        words += ["--parallel.tensor_model_parallel_size", 1, "--evaluation.data", "[]", *more]
        return [str(word).replace("{folder}", str(self.folder)) for word in words]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("original")
    size = ("--traces", 30, "--train-prompts", 40, "--heldout-prompts", 10)
    command = [sys.executable, EXAMPLES / "make_data.py", "--out", folder / "data", *size]
    subprocess.run([str(word) for word in command], check=True, timeout=100)
    (folder / "data" / "model").rename(folder / "model")
    return Place(folder)


@pytest.fixture(scope="module", autouse=True)
def launches(original: Place) -> Iterator[dict[str, Launch]]:
    """Two refused runs under torchrun, started first, so that they go on beside the other tests."""
    bad = original.folder / "bad.jsonl"
    bad.write_text((original.data / "sft.jsonl").read_text() + '{"prompt": "a=1,b=a+2,b?", "response": 7}\n')
    words = {
        "train": original.words("train", "--reward.name", "hash_anser"),
        "sft": original.words("sft", "--data.train", f'["{bad}"]'),
    }
    started = {
        name: Launch(f"megatron_dgpo.{name}", 2, words[name], original.folder / f"{name}.log")
        for name in words
    }
    yield started
    for launch in started.values():
        launch.kill()


@pytest.fixture
def place(original: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy to spoil, seen by one process of the world that a test says."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(original.model, tmp_path / "model")
    shutil.copytree(original.data, tmp_path / "data")
    return Place(tmp_path)


# --- settings ---------------------------------------------------------------------------------------


@dataclass
class Case:
    words: list[object]
    says: str
    """How the one error line goes on."""
    module: str = "train"
    world_size: int = 1
    hf: dict[str, Any] = field(default_factory=dict)
    """Fields of the model folder's config.json to change; None takes one away."""
    files: dict[str, str | None] = field(default_factory=dict)
    """Files of the folder to write; None removes one."""


TP, PP, CP = (f"--parallel.{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))
BATCH = ["--train.prompts_per_step", 12, "--train.prompts_per_minibatch"]
STAGE = "--model.transformer.num_layers_in_first_pipeline_stage"

SETTINGS = {
    # names
    "key": Case(["--train.step", 3], "train.step: unknown key (did you mean train.steps?)"),
    "key elsewhere": Case(["--train.lr", 3], "train.lr: unknown key (did you mean optimizer.lr?)"),
    "key without section": Case(["--seed", 3], "seed: unknown key (did you mean run.seed?)"),
    "key like none": Case(["--run.zzz", 3], "run.zzz: unknown key (--help lists all keys)"),
    "key of grpo": Case(["--algorithm.kl_coef", 0.1], "algorithm.kl_coef: not a setting of this algorithm"),
    "section": Case(["--optimiser.lr", 1], "optimiser: unknown section (did you mean optimizer?)"),
    "section like none": Case(["--bogus.key", 1], "bogus: unknown section (did you mean one of run, model, "),
    "key of the other run": Case(
        ["--algorithm.tau", 1], "algorithm: unknown section (did you mean one of run, ", module="sft"
    ),
    "value as section": Case(["--run.seed.x", 1], "run.seed: {'x': 1} is not an integer"),
    "section as value": Case(["--run", 1], "run: 1 is not a table"),
    "algorithm": Case(["--algorithm.name", "ppo"], "algorithm.name: 'ppo' is not one of dgpo, grpo"),
    "algorithm as value": Case(["--algorithm", "grpo"], "algorithm: 'grpo' is not a table"),
    "reward": Case(
        ["--reward.name", "length"],
        "reward.name: 'length' is not one of exact_match, hash_answer, math_verify",
    ),
    # types and ranges (more of them in test_config.py)
    "type": Case(["--train.steps", "many"], "train.steps: 'many' is not an integer"),
    "no value": Case(["--optimizer.lr"], "optimizer.lr: True is not a number"),
    "no text": Case(["--run.folder"], "run.folder: needs a value after it"),
    "range": Case(["--rollout.top_p", 1.5], "rollout.top_p: 1.5: input should be less than or equal to 1"),
    "nan": Case(["--optimizer.lr", "nan"], "optimizer.lr: nan: input should be a finite number"),
    "inf": Case(["--algorithm.tau", "inf"], "algorithm.tau: inf: input should be a finite number"),
    # files
    "no file": Case(["{folder}/none.toml"], "{folder}/none.toml: cannot be read (No such file or directory)"),
    "a folder": Case(["{folder}"], "{folder}: cannot be read (Is a directory)"),
    "not TOML": Case(["{folder}/x.toml"], "{folder}/x.toml: not valid TOML (", files={"x.toml": "[train\n"}),
    "not in file": Case(
        ["{folder}/x.toml"], "train.stebs: unknown key (did you", files={"x.toml": "[train]\nstebs = 3"}
    ),
    "two files": Case(
        ["{folder}/x.toml"], "rollout.top_k: 2.5 is not an integer", files={"x.toml": "rollout.top_k=2.5"}
    ),
    # ranks
    "world": Case(
        [TP, 2], "parallel: 3 processes do not divide into replicas of 2 (tensor 2 x", world_size=3
    ),
    "small world": Case(
        [TP, 2, PP, 3], "parallel: 2 processes do not divide into replicas of 6 (", world_size=2
    ),
    "context": Case([CP, 2], "parallel.context_parallel_size: 2 is not supported yet; use 1", world_size=2),
    "sequence": Case(
        ["--parallel.sequence_parallel"],
        "parallel.sequence_parallel: needs parallel.tensor_model_parallel_size above 1",
    ),
    # batches
    "minibatch": Case(
        [*BATCH, 8], "train.prompts_per_step: 12 is not a multiple of train.prompts_per_minibatch 8"
    ),
    "large minibatch": Case(
        [*BATCH, 24], "train.prompts_per_step: 12 is not a multiple of train.prompts_per_mini"
    ),
    "minibatch and replicas": Case(
        [*BATCH, 6],
        "train.prompts_per_minibatch: 6 does not divide by 4 data-parallel replicas",
        world_size=4,
    ),
    "batch and replicas": Case(
        ["--train.batch_size", 9],
        "train.batch_size: 9 does not divide by 2 data-parallel replicas",
        module="sft",
        world_size=2,
    ),
    "warm-up": Case(
        ["--train.steps", 2, "--optimizer.warmup_steps", 8],
        "optimizer.warmup_steps: 8 leaves nothing of 8 optim",
    ),
    "sft warm-up": Case(
        ["--train.steps", 20],
        "optimizer.warmup_steps: 20 leaves nothing of 20 optimizer steps; use",
        module="sft",
    ),
    "learning rates": Case(["--optimizer.min_lr", 0.5], "optimizer.min_lr: 0.5 is above optimizer.lr 0.0002"),
    "tokens of a prompt": Case(
        ["--rollout.max_new_tokens", 8000, "--train.max_tokens_per_microbatch", 9000],
        "rollout.max_new_tokens: with data.max_prompt_tokens it makes 8064 tokens, and the model has",
    ),
    "tokens of a micro-batch": Case(
        ["--train.max_tokens_per_microbatch", 100],
        "train.max_tokens_per_microbatch: 100 does not hold the longest sequence of 160 tokens",
    ),
    "tokens of an example": Case(
        ["--data.max_tokens", 9000], "data.max_tokens: 9000 is above the model's", module="sft"
    ),
    # data files
    "no data": Case(["--data.train", "[]"], "data.train: at least one file is needed"),
    "missing data": Case(
        ["--data.train", '["{folder}/a.jsonl"]'], "data.train: {folder}/a.jsonl is not a file"
    ),
    "missing held-out": Case(["--evaluation.data", '["a.jsonl"]'], "evaluation.data: a.jsonl is not a file"),
    "data of a kind": Case(
        ["--data.train", '["{folder}/a.csv"]'],
        "data.train: {folder}/a.csv is neither .jsonl nor .parquet",
        files={"a.csv": "prompt,answer\n"},
    ),
    # the model's folder
    "no model": Case(["--model.path", "{folder}/no"], "model.path: {folder}/no/config.json is not there"),
    "no weights": Case(
        ["--model.init", "weights"],
        "model.path: {folder}/model has no safetensors (model.init = 'random' starts",
    ),
    "config not JSON": Case(
        [], "model.path: {folder}/model/config.json is not valid JSON (", files={"model/config.json": "{"}
    ),
    "config a list": Case(
        [],
        "model.path: {folder}/model/config.json does not hold a JSON object",
        files={"model/config.json": "[]"},
    ),
    "config without heads": Case(
        [],
        "model.path: {folder}/model/config.json has no whole number num_attention_heads",
        hf={"num_attention_heads": None},
    ),
    "config without width": Case(
        [], "model.path: {folder}/model/config.json has no whole number hidden_size", hf={"hidden_size": None}
    ),
    "config with text": Case(
        [], "model.path: {folder}/model/config.json has no whole number vocab_size", hf={"vocab_size": "many"}
    ),
    "family": Case(
        [],
        "model.path: {folder}/model: config.json: model_type 'gpt2' is not supported (supported:",
        hf={"model_type": "gpt2"},
    ),
    "another layout": Case(
        [],
        "model.path: {folder}/model: config.json: model_type 'gpt2' is not supported",
        hf={"model_type": "gpt2", "num_attention_heads": None, "n_head": 4},
    ),
    "activation": Case(
        [],
        "model.path: {folder}/model: config.json: hidden_act 'gelu' is not supported (silu is)",
        hf={"hidden_act": "gelu"},
    ),
    "window": Case(
        [],
        "model.path: {folder}/model: config.json: use_sliding_window is not",
        hf={"use_sliding_window": True},
    ),
    "rope": Case(
        [],
        "model.path: {folder}/model: config.json: rope type 'yarn' is not supported (default is)",
        hf={"rope_parameters": {"rope_type": "yarn"}},
    ),
    "vocabulary": Case([], "model.path: the tokenizer's ids go up to ", hf={"vocab_size": 30}),
    "no tokenizer": Case(
        [], "model.path: {folder}/model/tokenizer.json is not there", files={"model/tokenizer.json": None}
    ),
    # the model and its split
    "heads": Case(
        [TP, 2],
        "parallel.tensor_model_parallel_size: 2 does not divide the model's 3 attention heads",
        world_size=2,
        hf={"num_attention_heads": 3},
    ),
    "KV heads": Case(
        [TP, 4],
        "parallel.tensor_model_parallel_size: 4 does not divide the model's 2 key/value heads",
        world_size=4,
    ),
    "MLP": Case(
        [TP, 2],
        "parallel.tensor_model_parallel_size: 2 does not divide the model's 63 MLP columns",
        world_size=2,
        hf={"intermediate_size": 63},
    ),
    "layers": Case(
        [PP, 2],
        "parallel.pipeline_model_parallel_size: 3 of the model's 3 layers do not divide into 2 stages",
        world_size=2,
    ),
    "first stage": Case(
        [PP, 3, STAGE, 2],
        "parallel.pipeline_model_parallel_size: 1 of the model's 3 layers do not divide into 2",
        world_size=3,
    ),
    "first stage as text": Case(
        [STAGE, "two"], "model.transformer.num_layers_in_first_pipeline_stage: 'two' is not"
    ),
    # what needs Megatron
    "Megatron's model": Case(
        ["--model.transformer.attention_dropuot", 0.1],
        "model.transformer.attention_dropuot: Megatron has no such field (did you mean model.",
    ),
    "Megatron's optimizer": Case(
        ["--optimizer.megatron.loss_scal", 2],
        "optimizer.megatron.loss_scal: Megatron has no such field (did you mean",
    ),
    "Megatron's DDP": Case(["--ddp.zzz", 1], "ddp.zzz: Megatron has no such field"),
    "Megatron's types": Case(
        ["--ddp.overlap_grad_reduce", "yes"], "ddp.overlap_grad_reduce: 'yes' is not true or false"
    ),
    "Megatron's numbers": Case(
        ["--model.transformer.attention_dropout", "low"],
        "model.transformer.attention_dropout: 'low' is not a number",
    ),
    "Transformer Engine": Case(
        ["--model.layer_spec", "transformer_engine"],
        "model.layer_spec: 'transformer_engine' needs Transformer Engine and a GPU",
    ),
    # the run's folder
    "used folder": Case(
        [],
        "run.folder: {folder}/run already holds a run (add --resume to go on with it, or",
        files={"run/metrics.jsonl": ""},
    ),
    "folder is a file": Case(
        [], "run.folder: {folder}/run cannot be made, since {folder}/run is a file; choose", files={"run": ""}
    ),
    "folder in a file": Case(
        ["--run.folder", "{folder}/run/a/b"],
        "run.folder: {folder}/run/a/b cannot be made, since {folder}/run is a",
        files={"run": ""},
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(
    name: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_dgpo.config import Config, SFTConfig
    from megatron_dgpo.run import parse

    case = SETTINGS[name]
    if name == "Transformer Engine" and has_transformer_engine():
        pytest.skip("Transformer Engine is there")
    hf = json.loads((place.model / "config.json").read_text()) | case.hf
    (place.model / "config.json").write_text(json.dumps({k: v for k, v in hf.items() if v is not None}))
    for path, text in case.files.items():
        (place.folder / path).parent.mkdir(exist_ok=True)
        (place.folder / path).unlink(missing_ok=True)
        if text is not None:
            (place.folder / path).write_text(text)
    before = sorted(place.folder.rglob("*"))
    monkeypatch.setenv("WORLD_SIZE", str(case.world_size))
    with pytest.raises(SystemExit) as caught:
        parse(place.words(case.module, *case.words), Config if case.module == "train" else SFTConfig)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: " + case.says.replace("{folder}", str(place.folder))), line
    assert out == "" and sorted(place.folder.rglob("*")) == before


def has_transformer_engine() -> bool:
    from megatron_dgpo.mcore.layers import have_transformer_engine

    return have_transformer_engine()


@pytest.mark.parametrize("module", ["train", "sft"])
def test_the_command_line_that_the_cases_change_is_right(module: str, place: Place) -> None:
    from megatron_dgpo.config import Config, SFTConfig
    from megatron_dgpo.run import parse

    config = parse(place.words(module), Config if module == "train" else SFTConfig)
    assert config.run.folder == place.folder / "run"
    # Nothing that a case turns off is wrong by itself.
    passed_through = ["--model.transformer.attention_dropout", "0", "--ddp.bucket_size", "1000"]
    more = ["--resume", "--optimizer.megatron.loss_scale", "2", *passed_through, STAGE, "3"]
    (place.folder / "run").mkdir()
    (place.folder / "run" / "metrics.jsonl").write_text("")
    assert parse(place.words(module, *more), type(config)).ddp == {"bucket_size": 1000}


def test_missing_keys_are_named(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_dgpo.config import Config
    from megatron_dgpo.run import parse

    path = place.folder / "few.toml"
    path.write_text("[data]\n[train]\nsteps = 3\n[optimizer]\nlr = 1e-3\n[reward]\nname = 'exact_match'")
    with pytest.raises(SystemExit) as caught:
        parse([str(path), "--model.path", "x"], Config)
    assert caught.value.code == 2
    told = [
        line.partition(": missing, and there is no default") for line in capsys.readouterr().err.splitlines()
    ]
    names = [
        "data.train",
        "train.prompts_per_step",
        "train.samples_per_prompt",
        "train.prompts_per_minibatch",
    ]
    assert told == [(f"error: {name}", ": missing, and there is no default", "") for name in names]


# --- data rows --------------------------------------------------------------------------------------

GOOD = '{"prompt": "a=1,b=a+2,b?", "answer": "3", "response": "b=3;#3"}\n'
ROWS = {
    "not JSON": ("train", GOOD + "{'prompt': 1}\n", ", row 2: not valid JSON (Expecting property name"),
    "cut": ("train", GOOD + '\n{"prompt": "a', ", row 3: not valid JSON (Unterminated string"),
    "a list": ("train", '["a", "b"]\n', ", row 1: expected a JSON object, got list"),
    "no prompt": ("train", GOOD + '{"answer": "3"}', ", row 2: no key 'prompt'; the row has ['answer']"),
    "no answer": ("train", GOOD + '{"prompt": "3"}', ", row 2: no key 'answer'; the row has ['prompt']"),
    "no response": ("sft", GOOD + '{"prompt": "3"}', ", row 2: no key 'response'; the row has ['prompt']"),
    "prompt a number": (
        "train",
        '{"prompt": 3, "answer": "3"}',
        ", row 1: 'prompt' is a int, expected a string or",
    ),
    "prompt empty": ("train", GOOD + '{"prompt": " ", "answer": "3"}', ", row 2: 'prompt' is empty"),
    "prompt empty for sft": ("sft", GOOD + '{"prompt": "", "response": "3"}', ", row 2: 'prompt' is empty"),
    "chat empty": ("train", '{"prompt": [], "answer": "3"}', ", row 1: 'prompt' is empty"),
    "chat of text": (
        "train",
        '{"prompt": ["a"], "answer": "3"}',
        ", row 1: message 1 of 'prompt' is a str, expected",
    ),
    "chat without content": (
        "train",
        '{"prompt": [{"role": "user"}], "answer": "3"}',
        ", row 1: message 1 of 'prompt' has no string 'content'",
    ),
    "chat with an end": (
        "sft",
        '{"prompt": [{"role": "assistant", "content": "b"}], "response": "3"}',
        ", row 1: 'prompt' ends with an assistant message; there is nothing to answer",
    ),
    "answer a list": (
        "train",
        '{"prompt": "a", "answer": [3]}',
        ", row 1: 'answer' is a list, expected a string or a number",
    ),
    "answer empty": ("train", '{"prompt": "a", "answer": ""}', ", row 1: 'answer' is empty"),
    "response null": (
        "sft",
        '{"prompt": "a", "response": null}',
        ", row 1: 'response' is a NoneType, expected a string",
    ),
    "response empty": ("sft", '{"prompt": "a", "response": " "}', ", row 1: 'response' is empty"),
    "no rows": ("train", "\n\n", " has no rows"),
}


def refused(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """The one error line of an entry point's `main`, which must not come to process groups."""
    import importlib

    from megatron_dgpo import platform

    def no_groups(*_: object, **__: object) -> None:
        raise AssertionError("process groups were built")

    entry = importlib.import_module(f"megatron_dgpo.{module}")
    monkeypatch.setattr(entry, "set_up_logging", lambda *_: None)  # pytest has its own
    monkeypatch.setattr(platform, "start", no_groups)
    with pytest.raises(SystemExit) as caught:
        entry.main.__wrapped__(words)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    module, text, says = ROWS[name]
    path = place.data / "bad.jsonl"
    path.write_text(text)
    line = refused(module, place.words(module, "--data.train", f'["{path}"]'), monkeypatch, capsys)
    at = f"error: {path}" if says.startswith(",") else f"error: data file {path}"
    assert line.startswith(at + says), line
    assert not (place.folder / "run").exists()


@pytest.mark.parametrize("module", ["train", "sft"])
def test_held_out_rows_are_read_before_the_run(
    module: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = place.data / "heldout.jsonl"
    path.write_text(GOOD + '{"prompt": "a"}\n')
    line = refused(module, place.words(module, "--evaluation.data", f'["{path}"]'), monkeypatch, capsys)
    assert line == f"error: {path}, row 2: no key 'answer'; the row has ['prompt']"


def test_other_input_that_cannot_be_used(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def line(*words: object) -> str:
        return refused("train", place.words("train", *words), monkeypatch, capsys)

    binary, table = place.data / "bad.jsonl", place.data / "bad.parquet"
    binary.write_bytes(GOOD.encode() + b'{"prompt": "\xff"}\n')
    assert line("--data.train", f'["{binary}"]') == f"error: {binary}, row 2: not UTF-8 (invalid start byte)"
    table.write_text("not a table")
    assert line("--data.train", f'["{table}"]').startswith(f"error: data file {table}: not a parquet file (")
    again = f'["{place.data}/train.jsonl", "{place.data}/train.jsonl"]'
    assert "share the stem 'train'; rename one" in line("--data.train", again)
    assert "have more than max_prompt_tokens=2 tokens" in line("--data.max_prompt_tokens", 2)
    settings = json.loads((place.model / "tokenizer_config.json").read_text())
    settings["eos_token"] = None
    (place.model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert (
        line() == f"error: model.path: the tokenizer of {place.model} has no eos_token, which ends a response"
    )
    shutil.copy(EXAMPLES / "README.md", place.model / "tokenizer.json")
    assert line().startswith(f"error: model.path: {place.model}/tokenizer.json is not valid JSON")


def test_a_tokenizer_without_a_template(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (place.model / "chat_template.jinja").unlink()
    line = refused("sft", place.words("sft"), monkeypatch, capsys)
    assert line.startswith(
        "error: apply_chat_template is true but the tokenizer has no chat template; give it"
    )


# --- under torchrun ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("train", "reward.name: 'hash_anser' is not one of exact_match, hash_answer, math_verify"),
        ("sft", "{folder}/bad.jsonl, row 31: 'response' is a int, expected a string"),
    ],
)
def test_entry_points_say_it_once(name: str, says: str, original: Place, launches: dict[str, Launch]) -> None:
    """Rank 0 says it in one line; torchrun's own report ends with it; nobody shows a trace of ours."""
    assert launches[name].wait(100) == 1  # torchrun's status; the rank's is in the report below
    lines = launches[name].output.splitlines()
    says = says.replace("{folder}", str(original.folder))
    assert [line for line in lines if line.startswith("error:")] == [f"error: {says}"]
    assert [line.split() for line in lines[-2:-1]] == [f"traceback : {says}".split()]
    assert [line.split()[2] for line in lines if line.strip().startswith("exitcode")][-1] == "2"
    own = f'File "{ROOT / "megatron_dgpo"}'
    assert not [line for line in lines if own in line]
    assert sum(line.startswith("Traceback") for line in lines) <= 1  # torchrun's
    assert not (original.folder / "run").exists()
