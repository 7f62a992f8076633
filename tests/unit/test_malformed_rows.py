"""Rows that JSON or a table can spell and a run cannot use: each is named, and costs no other row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import preprocess_data
import pyarrow
import pyarrow.parquet as pq
import pytest

from megatron_dgpo import jsontext
from megatron_dgpo.checks import read_json
from megatron_dgpo.cli import ConfigError, load
from megatron_dgpo.config import Config
from megatron_dgpo.data import load_supervised
from megatron_dgpo.data.problems import read_problems
from megatron_dgpo.evaluation.records import SampleFile
from megatron_dgpo.mcore.hf_config import ModelShape
from megatron_dgpo.observe import jsonl
from megatron_dgpo.types import Group, Prompt, Sample
from megatron_dgpo.weights.folders import config_dtype, tensor_files

DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5_000
SURROGATE = r"\ud800"
NO_TEXT = "character 1 is a lone surrogate, \\ud800"
DIGITS = "JSON that cannot be read (an integer of more than 4,300 digits)"
TOO_DEEP = "JSON that cannot be read (brackets are nested too deep)"

ROWS = {
    "NaN": ('{"prompt": "p", "answer": NaN}', "'answer' is nan, expected a string or a finite number"),
    "infinite": ('{"prompt": "p", "answer": -Infinity}', "'answer' is -inf, expected a string or a finite"),
    "above a double": ('{"prompt": "p", "answer": 1e400}', "'answer' is inf, expected a string or a finite"),
    "long integer": (f'{{"prompt": "p", "answer": {LONG}}}', DIGITS),
    "deep answer": (f'{{"prompt": "p", "answer": {DEEP}}}', TOO_DEEP),
    "deep, cut": ("[" * 100_000, TOO_DEEP),
    "deep objects": ('{"a":' * 100_000, TOO_DEEP),
    "surrogate in prompt": (f'{{"prompt": "{SURROGATE}", "answer": "1"}}', f"'prompt' is no text: {NO_TEXT}"),
    "surrogate in answer": (f'{{"prompt": "p", "answer": "{SURROGATE}"}}', f"'answer' is no text: {NO_TEXT}"),
    "surrogate in message": (
        f'{{"prompt": [{{"role": "user", "content": "{SURROGATE}"}}], "answer": "1"}}',
        f"'content' of message 1 of 'prompt' is no text: {NO_TEXT}",
    ),
    "surrogate in source": (
        f'{{"prompt": "p", "answer": "1", "data_source": "{SURROGATE}"}}',
        f"'data_source' is no text: {NO_TEXT}",
    ),
    "source a number": (
        '{"prompt": "p", "answer": "1", "data_source": 3}',
        "'data_source' is a int, expected",
    ),
    "two prompts": (
        '{"prompt": "p", "answer": "1", "prompt": "q"}',
        "JSON that cannot be read (the key 'prompt' occurs twice, with different values)",
    ),
    "true": ('{"prompt": "p", "answer": true}', "'answer' is a bool, expected a string or a number"),
    "null": ('{"prompt": "p", "answer": null}', "'answer' is a NoneType, expected a string or a number"),
    "list": ('{"prompt": "p", "answer": ["1"]}', "'answer' is a list, expected a string or a number"),
    "blank prompt": ('{"prompt": " \\u2003\\n", "answer": "1"}', "'prompt' is empty"),
    "NUL bytes": ("\0" * 40, "not valid JSON (Expecting value, column 1)"),
    "raw NUL": (
        '{"prompt": "a\0", "answer": "1"}',
        "not valid JSON (Invalid control character at, column 14)",
    ),
}
GOOD = {
    "a float that is whole": ('{"prompt": "p", "answer": 7.0}', "7"),
    "a float": ('{"prompt": "p", "answer": 0.50}', "0.5"),
    "a large float": ('{"prompt": "p", "answer": 1e22}', "1" + "0" * 22),
    "a small float": ('{"prompt": "p", "answer": -1.5e-7}', "-0.00000015"),
    "minus nothing": ('{"prompt": "p", "answer": -0.0}', "0"),
    "a large integer": (f'{{"prompt": "p", "answer": {"9" * 4_000}}}', "9" * 4_000),
    "text": ('{"prompt": "p", "answer": "7.0"}', "7.0"),
    "NaN where nobody looks": ('{"prompt": "p", "answer": "1", "difficulty": NaN}', "1"),
    "a surrogate where nobody looks": (f'{{"prompt": "p", "answer": "1", "note": "{SURROGATE}"}}', "1"),
    "a pair of surrogates": (r'{"prompt": "p", "answer": "\ud83d\ude00"}', "\U0001f600"),
    "a key twice, one value": ('{"prompt": "p", "answer": "1", "prompt": "p"}', "1"),
    "an empty cell": ('{"prompt": "p", "answer": "1", "data_source": NaN}', "1"),
}


def test_each_row_of_a_file_is_named_and_costs_no_other(tmp_path: Path, capsys: Any) -> None:
    path, out, rejected = (tmp_path / name for name in ("data.jsonl", "out.jsonl", "rejected.jsonl"))
    lines = [row for pair in zip(ROWS.values(), list(GOOD.values()) * 2, strict=False) for row, _ in pair]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([GOOD["text"][0], *lines]).encode())
    says = {f"{path}, row {2 * k}: {why}" for k, (_, why) in enumerate(ROWS.values(), start=1)}
    golds = [gold for (_, gold), _ in zip(list(GOOD.values()) * 2, ROWS, strict=False)]
    malformed: list[str] = []
    found = list(read_problems([path], prompt_key="prompt", answer_key="answer", malformed=malformed))
    assert [p.answer for p in found] == ["7.0", *golds]
    assert len(malformed) == len(ROWS)
    assert [text for text in malformed if not any(text.startswith(start) for start in says)] == []
    words = [str(path), "--out", str(out), "--rejected", str(rejected), "--keep-duplicates"]
    assert preprocess_data.main(words) == 0
    assert [json.loads(line)["answer"] for line in out.read_bytes().splitlines()] == ["7.0", *golds]
    assert [json.loads(line)["row"] for line in rejected.read_bytes().splitlines()] == malformed
    assert f"left out, malformed: {len(ROWS)}, such as " in capsys.readouterr().out


@pytest.mark.parametrize("name", ROWS)
def test_one_row_ends_a_run_in_one_line(name: str, tmp_path: Path) -> None:
    row, why = ROWS[name]
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD['text'][0]}\n{row}\n")
    with pytest.raises(ValueError) as caught:
        list(read_problems([path], prompt_key="prompt", answer_key="answer"))
    assert str(caught.value).startswith(f"{path}, row 2: {why}") and "\n" not in str(caught.value)


def bad_text(column: pyarrow.Array) -> pyarrow.Array:
    """The column with its first text's first byte made 0xff, as damaged files have it."""
    valid, offsets, data = column.buffers()
    spoilt = pyarrow.py_buffer(b"\xff" + data.to_pybytes()[1:])
    return pyarrow.Array.from_buffers(pyarrow.utf8(), len(column), [valid, offsets, spoilt])


def test_rows_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    answers = [float("nan"), float("inf"), None, 7.0, 0.25]
    malformed: list[str] = []

    def golds(table: dict[str, Any]) -> list[str]:
        malformed.clear()
        pq.write_table(pyarrow.table(table), path)
        found = read_problems([path], prompt_key="prompt", answer_key="answer", malformed=malformed)
        return [p.answer for p in found]

    assert golds({"prompt": ["p"] * 5, "answer": answers}) == ["7", "0.25"]
    finite = "expected a string or a finite number"
    assert malformed == [
        f"{path}, row 1: 'answer' is nan, {finite}",
        f"{path}, row 2: 'answer' is inf, {finite}",
        f"{path}, row 3: 'answer' is a NoneType, expected a string or a number",
    ]
    prompts = bad_text(pyarrow.array(["p", "q", "r"]))
    decimals = [Decimal("1.50"), Decimal("2"), Decimal("1000")]
    assert golds({"prompt": prompts, "answer": decimals}) == ["2", "1000"]
    assert malformed == [f"{path}, row 1: not UTF-8 (invalid start byte)"]
    dates = pyarrow.array([0, 2**62], pyarrow.timestamp("us"))  # the second is beyond Python's
    assert golds({"prompt": ["p", "q"], "answer": dates}) == [] and len(malformed) == 2
    assert malformed[0] == f"{path}, row 1: 'answer' is a datetime, expected a string or a number"
    assert malformed[1].startswith(f"{path}, row 2: cannot be read (")
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(60) + content[64:])
    with pytest.raises(ValueError, match=rf"^data file {path}: damaged after row 0 \("):
        list(read_problems([path], prompt_key="prompt", answer_key="answer"))


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real `datasets` on a table in memory; how it comes from a hub is another test's."""
    import datasets

    prompts = bad_text(pyarrow.array(["p", "q", "r", "s"])).take(pyarrow.array([1, 0, 2, 3]))
    table = pyarrow.table({"prompt": prompts, "answer": [1.0, 2.0, float("nan"), 4.5]})
    made = datasets.Dataset(datasets.table.InMemoryTable(table))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    malformed: list[str] = []
    found = read_problems(["hub://a/b"], prompt_key="prompt", answer_key="answer", malformed=malformed)
    assert [(p.id, p.answer) for p in found] == [("b-train:1", "1"), ("b-train:4", "4.5")]
    assert malformed[0].startswith("hub://a/b?split=train, row 2: cannot be read ('utf-8' codec")
    assert malformed[1] == (
        "hub://a/b?split=train, row 3: 'answer' is nan, expected a string or a finite number"
    )
    assert len(malformed) == 2


@pytest.mark.parametrize(
    ("response", "why"),
    [
        (f'"{SURROGATE}"', f"'response' is no text: {NO_TEXT}"),
        ("NaN", "'response' is a float, expected a string"),
        (LONG, DIGITS),
        (DEEP, TOO_DEEP),
        ("null", "'response' is a NoneType, expected a string"),
    ],
    ids=["surrogate", "NaN", "long integer", "deep", "null"],
)
def test_supervised_rows(response: str, why: str, tmp_path: Path) -> None:
    class Tokenizer:
        eos_token_id, chat_template, all_special_tokens = 0, None, ()

    path = tmp_path / "sft.jsonl"
    path.write_text(f'\ufeff{{"prompt": "p", "response": "r"}}\n{{"prompt": "p", "response": {response}}}\n')
    settings = dict(prompt_key="prompt", response_key="response", apply_chat_template=False, max_tokens=9)
    with pytest.raises(ValueError) as caught:
        load_supervised([path], Tokenizer(), **settings)  # type: ignore[arg-type]
    assert str(caught.value) == f"{path}, row 2: {why}"


# --- files beside the data --------------------------------------------------------------------------


def sample(text: str, answer: str | None = None) -> Group:
    prompt = Prompt("data:1", (), "q", "1", {})
    one = Sample(prompt, 0, [1, 2], [], "stop", (), text=text, reward=1.0, answer=answer)
    return Group(prompt, [one])


def test_samples_of_an_evaluation(tmp_path: Path) -> None:
    """Whatever a response says is read back; a row that is none is named."""
    path = tmp_path / "samples.jsonl"
    texts = "one\u2028two\x85three\x1cfour\r\nfive\0"  # what str.splitlines takes for ends of lines
    group = sample(texts, "\ud800")
    SampleFile(path, {}).append(group)
    (again,) = SampleFile(path, {}).groups([group.prompt], 1).values()
    assert (again.samples[0].text, again.samples[0].answer) == (texts, "\ud800")
    good = path.read_bytes()
    row = json.loads(good.split(b"\n")[1])
    for bad, why in {
        DEEP: TOO_DEEP,
        f'{{"index": {LONG}}}': DIGITS,
        "[1]": "no JSON object",
        '{"prompt": "data:1"}': "no sample: it has no 'question'",
        json.dumps(row | {"reward": float("nan")}): "no sample: its 'reward' is nan",
        json.dumps(row | {"token_ids": None}): "no sample: its 'token_ids' is None",
        '{"prompt"': "not valid JSON (Expecting ':' delimiter, column 10)",
    }.items():
        path.write_bytes(good + bad.encode() + b"\n")
        with pytest.raises(ValueError) as caught:
            SampleFile(path, {})
        assert str(caught.value) == f"{path}, line 3 is {why}"


def test_metrics_and_other_lines_of_a_run(tmp_path: Path) -> None:
    for bad in (DEEP, LONG, '{"step": 1, "step": 2}', "[]"):
        assert jsonl.parse(bad.encode()) is None
    for depth in range(100, 1200, 50):  # what is not too deep to be parsed is not too deep to be written
        row = jsonl.parse(f'{{"a": {"[" * depth}1{"]" * depth}}}'.encode())
        assert row is None or jsonl.dump(row)
    assert jsonl.parse(b'{"a": NaN, "b": [1e400], "c": 1}\r') == {"a": None, "b": [None], "c": 1}
    path = tmp_path / "x.jsonl"
    jsonl.write(path, [{"error": "\udcff", "n": float("inf"), "text": "\u2028"}])
    assert jsonl.read(path) == [{"error": "\ufffd", "n": None, "text": "\u2028"}]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (DEEP, TOO_DEEP),
        (f'{{"vocab_size": {LONG}}}', DIGITS),
        ('{"vocab_size": 1, "vocab_size": 2}', "JSON that cannot be read (the key 'vocab_size' occurs twice, "
         "with different values)"),
        ('{\n"a": }', "not valid JSON (Expecting value, line 2, column 6)"),
    ],
    ids=["deep", "long integer", "two sizes", "cut"],
)  # fmt: skip
def test_files_of_a_model(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert read_json(path) == f"{path} is {why}"
    for call in (ModelShape.from_folder, config_dtype):
        with pytest.raises(ValueError) as caught:
            call(tmp_path)
        assert str(caught.value) == f"{path} is {why}"
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged \("):
        tensor_files(tmp_path)
    path.write_bytes(b'\xef\xbb\xbf{"dtype": "bfloat16",\r\n"x": 1}')
    assert read_json(path) == {"dtype": "bfloat16", "x": 1} and config_dtype(tmp_path) == "bfloat16"


def problems(words: list[str]) -> Iterator[str]:
    try:
        load(words, Config)
    except ConfigError as error:
        yield from error.problems


def test_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    for text, why in {
        f"x = {DEEP}": "TOML that cannot be read (brackets are nested too deep)",
        f"x = {LONG}": "TOML that cannot be read (an integer of more than 4,300 digits)",
        "x = \0": "not valid TOML (Invalid value (at line 1, column 5))",
    }.items():
        path.write_text(text)
        assert list(problems([str(path)])) == [f"{path}: {why}"]
    path.write_bytes("\ufeff[train]\r\nsteps = 0\r\n".encode())
    assert [p for p in problems([str(path)]) if "train.steps" in p] == [
        "train.steps: 0: input should be greater than or equal to 1"
    ]
    assert list(problems([str(path), "--train.steps", "5", "--data.system_prompt", "\udcff"])) == [
        "data.system_prompt: '\\udcff' is not UTF-8"
    ]
    for word in (LONG, DEEP):
        assert [p[:20] for p in problems(["--train.steps", word]) if "train.steps" in p] == [
            f"train.steps: '{word[:6]}"
        ]


def test_the_reader_of_json() -> None:
    assert jsontext.loads(b'\xef\xbb\xbf{"a": "\xf0\x9f\x98\x80"}\r\n') == {"a": "\U0001f600"}
    assert jsontext.loads('{"a": {"b": 1, "b": 1}}') == {"a": {"b": 1}}
    for content, why in {
        b"\xff\xfe{\x00": "not UTF-8 (invalid start byte)",
        b"": "not valid JSON (Expecting value, column 1)",
        b"{} {}": "not valid JSON (Extra data, column 4)",
    }.items():
        with pytest.raises(ValueError) as caught:
            jsontext.loads(content)
        assert str(caught.value) == why
