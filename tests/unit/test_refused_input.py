"""What is refused of input files, in which words, and how it looks under torchrun."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from launch import ROOT, Launch
from place import EXAMPLES, Place

RESTARTS = {"train": 0, "sft": 2}
"""That torchrun has, of which it makes none."""


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
        name: Launch(
            f"megatron_dgpo.{name}",
            2,
            words[name],
            original.folder / f"{name}.log",
            cold=True,
            max_restarts=RESTARTS[name],
        )
        for name in words
    }
    yield started
    for launch in started.values():
        launch.kill()


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

    from torch.distributed.elastic.multiprocessing import errors

    from megatron_dgpo import entry, platform

    def no_groups(*_: object, **__: object) -> None:
        raise AssertionError("process groups were built")

    monkeypatch.setattr(entry, "set_up_logging", lambda *_: None)  # pytest has its own
    monkeypatch.setattr(errors, "record", lambda main: main)  # which dumps threads where pytest does
    monkeypatch.setattr(platform, "start", no_groups)
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(f"megatron_dgpo.{module}").main(words)
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
    says = "error: rollout.stop_tokens: 'now' is 3 tokens of this model and not one; use a text that is one"
    assert line("--rollout.stop_tokens", '["now"]').startswith(says)
    for name, key in (("tokenizer", "eos_token"), ("generation", "eos_token_id"), ("", "eos_token_id")):
        path = place.model / f"{name}_config.json".strip("_")
        path.write_text(json.dumps({**json.loads(path.read_text()), key: None}))
    assert line() == (
        f"error: model.path: the tokenizer of {place.model} has no eos_token, which ends a response; nor do "
        "generation_config.json, config.json and rollout.stop_tokens name one"
    )
    shutil.copy(EXAMPLES / "README.md", place.model / "tokenizer.json")
    assert line().startswith(f"error: model.path: {place.model}/tokenizer.json is not valid JSON")
    (place.model / "tokenizer.json").unlink()
    (place.model / "tokenizer.model").write_text("")
    says = (
        f"error: model.path: the tokenizer of {place.model} cannot be loaded: its tokenizer.model needs the"
    )
    assert line().startswith(says)


@pytest.mark.parametrize(
    ("module", "key", "rows"), [("train", "train.prompts_per_step", 40), ("sft", "train.batch_size", 70)]
)
def test_more_prompts_a_step_than_rows(
    module: str, key: str, rows: int, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = place.words(module, f"--{key}", 80)
    line = refused(module, words, monkeypatch, capsys)
    assert line == f"error: {key}: 80 is more than the {rows} rows of data.train"


def test_more_prompts_a_draw_than_rows(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = place.words("train", "--rollout.oversampling", 1.5, "--rollout.dynamic_sampling")
    line = refused("train", words, monkeypatch, capsys)
    assert line == "error: rollout.oversampling: 48 is more than the 40 rows of data.train"


@pytest.mark.parametrize("module", ["train", "sft"])
def test_a_held_out_prompt_that_leaves_no_room(
    module: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = place.data / "heldout.jsonl"
    path.write_text(GOOD + json.dumps({"prompt": "a" * 200, "answer": "1"}) + "\n")
    words = place.words(module, "--evaluation.data", f'["{path}"]')
    line = refused(module, words, monkeypatch, capsys)
    assert line.startswith(
        "error: evaluation.data, heldout:2: 202 tokens and rollout.max_new_tokens make 298"
    )


CHANGES = {
    "algorithm.tau": 0.5,
    "data.shuffle": "false",
    "optimizer.lr": 1e-3,
    "rollout.temperature": 0.5,
    "run.seed": 9,
    "train.samples_per_prompt": 4,
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_resumed_run_is_the_same_run(key: str, place: Place, monkeypatch: Any, capsys: Any) -> None:
    from megatron_dgpo.cli import dump_toml
    from megatron_dgpo.config import Config
    from megatron_dgpo.entry import parse

    run = place.folder / "run"
    (run / "checkpoints" / "step_00000003").mkdir(parents=True)
    (run / "config.toml").write_text(dump_toml(parse(place.words("train"), Config)))
    may_change = ["--train.steps", 99, "--checkpoint.every", 7, "--run.quiet", "true"]
    assert parse(place.words("train", "--resume", *may_change), Config).train.steps == 99
    line = refused("train", place.words("train", "--resume", f"--{key}", CHANGES[key]), monkeypatch, capsys)
    assert line.startswith(f"error: {key}: the run in {run} has "), line
    (run / "checkpoints" / "step_00000003").rmdir()  # nothing to go on from: the run starts afresh
    parse(place.words("train", "--resume", f"--{key}", CHANGES[key]), Config)


def test_a_run_from_before_a_setting_was_there_has_its_default(
    place: Place, monkeypatch: Any, capsys: Any
) -> None:
    from megatron_dgpo.cli import dump_toml
    from megatron_dgpo.config import Config
    from megatron_dgpo.entry import parse

    run, later = place.folder / "run", ("dynamic_sampling", "oversampling", "async_steps", "tis_cap")
    (run / "checkpoints" / "step_00000003").mkdir(parents=True)
    lines = dump_toml(parse(place.words("train"), Config)).splitlines()
    kept = [line for line in lines if not line.startswith(later)]
    assert len(kept) == len(lines) - len(later)
    (run / "config.toml").write_text("\n".join(kept))
    parse(place.words("train", "--resume"), Config)
    words = place.words("train", "--resume", "--rollout.dynamic_sampling")
    line = refused("train", words, monkeypatch, capsys)
    assert line.startswith(f"error: rollout.dynamic_sampling: the run in {run} has False, not True")
    (run / "config.toml").write_text("\n".join([*kept, "[train.gone]", "x = 1"]))
    line = refused("train", place.words("train", "--resume"), monkeypatch, capsys)
    says = f"error: run.folder: {run / 'config.toml'} is not of this release (train.gone: unknown key"
    assert line.startswith(says), line


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
        (
            "train",
            "reward.name: 'hash_anser' is not one of exact_match, hash_answer, math_verify, "
            "multiple_choice, or 'package.module:function'",
        ),
        ("sft", "{folder}/bad.jsonl, row 71: 'response' is a int, expected a string"),
    ],
)
def test_entry_points_say_it_once(name: str, says: str, original: Place, launches: dict[str, Launch]) -> None:
    """Rank 0 says it in one line; torchrun's own report ends with it or, with restarts left, says that it was
    ended; nobody shows a trace of ours."""
    assert launches[name].wait() == 1  # torchrun's status; the rank's is in the report below
    lines = launches[name].output.splitlines()
    says = says.replace("{folder}", str(original.folder))
    assert [line for line in lines if line.startswith("error:")] == [f"error: {says}"]
    if RESTARTS[name]:
        trace = next(n for n, line in enumerate(lines) if line.startswith("Traceback"))
        assert f"error: {says}" in lines[:trace] and "got signal: 15" in lines[-1]
    else:
        assert [line.split() for line in lines[-2:-1]] == [f"traceback : {says}".split()]
        assert [line.split()[2] for line in lines if line.strip().startswith("exitcode")][-1] == "2"
    own = f'File "{ROOT / "megatron_dgpo"}'
    assert not [line for line in lines if own in line]
    assert sum(line.startswith("Traceback") for line in lines) <= 1  # torchrun's
    assert not (original.folder / "run").exists()
