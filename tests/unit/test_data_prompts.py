"""Prompt and supervised data: layouts, malformed rows, order of the prompts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_dgpo.data import PromptCursor, deduplicate, load_prompts, load_supervised
from megatron_dgpo.types import Prompt

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
AIME, GSM8K = SHARED / "aime-2024.parquet", SHARED / "gsm8k_test.jsonl"
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: id 0 is the end of a sequence, byte-level character c has id 1 + its rank."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<eos>", *alphabet])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path: Any, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> list[Prompt]:
    arguments = {"prompt_key": "prompt", "answer_key": "answer", "apply_chat_template": False} | changes
    return load_prompts(path, tokenizer, **arguments)


def test_plain_rows_and_messages_give_the_same_prompt(tmp_path, tokenizer):
    rows = [
        {"prompt": "2+2?", "answer": "4"},
        {"prompt": [{"role": "user", "content": "2+2?"}], "answer": 4},
    ]
    path = write(tmp_path / "math.jsonl", rows)
    for template in (True, False):
        first, second = load(path, tokenizer, apply_chat_template=template)
        assert first.token_ids == second.token_ids
        assert (first.id, second.id) == ("math:1", "math:2")
        assert first.answer == second.answer == "4"
    templated = load(path, tokenizer, apply_chat_template=True, system_prompt="Think.")[0]
    assert templated.text == "[system]Think.<eos>[user]2+2?<eos>[assistant]"
    expected = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Think."}, {"role": "user", "content": "2+2?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert list(templated.token_ids) == expected
    raw = load(path, tokenizer, system_prompt="Think.")[0]
    assert raw.text == "Think.\n\n2+2?" and len(raw.token_ids) == len(raw.text)


def test_dapo_layout_is_recognised_in_parquet_and_jsonl(tmp_path, tokenizer):
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": f"What is {n}?"}],
            "reward_model": {"ground_truth": str(n), "style": "rule"},
        }
        for n in range(5000)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "dapo.parquet")
    write(tmp_path / "lines.jsonl", rows)
    by_parquet = load(tmp_path / "dapo.parquet", tokenizer)
    by_lines = load(tmp_path / "lines.jsonl", tokenizer, answer_key=None)
    dotted = load(tmp_path / "dapo.parquet", tokenizer, answer_key="reward_model.ground_truth")
    assert [p.answer for p in by_parquet] == [str(n) for n in range(5000)]
    assert [p.token_ids for p in by_parquet] == [p.token_ids for p in by_lines]
    assert by_parquet == dotted
    assert by_parquet[-1].id == "dapo:5000" and by_parquet[0].metadata == {"data_source": "math_dapo"}


def test_gsm8k_layout_keeps_the_worked_answer(tmp_path, tokenizer):
    path = write(tmp_path / "gsm.jsonl", [{"question": "1+1?", "answer": "One and one.\n#### 2"}, "", " "])
    (prompt,) = load(path, tokenizer, prompt_key="question")
    assert prompt.answer == "One and one.\n#### 2"


GOOD = {"prompt": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ('{"prompt": "a"', "not valid JSON"),
        ('["a"]', "expected a JSON object, got list"),
        ({"answer": "b"}, "no key 'prompt'; the row has ['answer']"),
        ({"prompt": "a"}, "no key 'answer'; the row has ['prompt']"),
        ({"prompt": 3, "answer": "b"}, "'prompt' is a int, expected a string or a list"),
        ({"prompt": " ", "answer": "b"}, "'prompt' is empty"),
        ({"prompt": [], "answer": "b"}, "'prompt' is empty"),
        ({"prompt": [{"role": "user"}], "answer": "b"}, "message 1 of 'prompt' has no string 'content'"),
        ({"prompt": ["hi"], "answer": "b"}, "message 1 of 'prompt' is a str, expected an object"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "answer": "b"}, "ends with an assistant"),
        ({"prompt": [{"role": "user", "content": "x"}] * 2, "answer": "b"}, "needs apply_chat_template"),
        ({"prompt": "a", "answer": " "}, "'answer' is empty"),
        ({"prompt": "a", "answer": None}, "'answer' is a NoneType, expected a string or a number"),
        ({"prompt": "a", "answer": True}, "'answer' is a bool, expected a string or a number"),
        ({"prompt": "a", "reward_model": {}}, "no key 'reward_model.ground_truth'"),
    ],
)
def test_malformed_rows_are_named(tmp_path, tokenizer, row, complaint):
    path = write(tmp_path / "bad.jsonl", [GOOD, GOOD, row, GOOD])
    with pytest.raises(ValueError) as caught:
        load(path, tokenizer)
    assert f"{path}, row 3: " in str(caught.value) and complaint in str(caught.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path, tokenizer):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff", "answer": "b"}\n')
    with pytest.raises(ValueError, match="bad.jsonl, row 2: not UTF-8"):
        load(path, tokenizer)


def test_malformed_parquet_row_is_named(tmp_path, tokenizer):
    rows = [{"prompt": "a", "answer": "b"}] * 5000 + [{"prompt": "a", "answer": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad.parquet, row 5001: 'answer' is a NoneType"):
        load(tmp_path / "bad.parquet", tokenizer)
    (tmp_path / "no.parquet").write_text("hello")
    with pytest.raises(ValueError, match="not a parquet file"):
        load(tmp_path / "no.parquet", tokenizer)


def test_bad_files_and_settings_are_refused(tmp_path, tokenizer):
    good = write(tmp_path / "good.jsonl", [GOOD])
    with pytest.raises(FileNotFoundError, match="gone.jsonl does not exist"):
        load(tmp_path / "gone.jsonl", tokenizer)
    with pytest.raises(ValueError, match="has no rows"):
        load(write(tmp_path / "empty.jsonl", []), tokenizer)
    with pytest.raises(ValueError, match="unknown type '.csv'"):
        load(write(tmp_path / "x.csv", [GOOD]), tokenizer)
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match="share the stem 'good'"):
        load([good, write(tmp_path / "sub" / "good.jsonl", [GOOD])], tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        load(good, bare, apply_chat_template=True)
    own = write(tmp_path / "own.jsonl", [{"prompt": [{"role": "system", "content": "s"}] * 2, "answer": "b"}])
    with pytest.raises(ValueError, match="system message of its own"):
        load(own, tokenizer, system_prompt="Think.")


def test_long_prompts_are_left_out_and_counted(tmp_path, tokenizer, caplog):
    path = write(tmp_path / "l.jsonl", [{"prompt": "x" * n, "answer": "1"} for n in (3, 9, 5, 12)])
    with caplog.at_level(logging.WARNING):
        kept = load(path, tokenizer, max_prompt_tokens=5)
    assert [prompt.id for prompt in kept] == ["l:1", "l:3"]
    assert "left out 2 of 4 prompts with more than max_prompt_tokens=5" in caplog.text
    assert "l:4, has 12" in caplog.text
    with pytest.raises(ValueError, match="all 4 prompts have more"):
        load(path, tokenizer, max_prompt_tokens=2)


def test_deduplicate_keeps_the_first_and_refuses_other_answers(tmp_path, tokenizer):
    pairs = [("p", "1"), ("q", "so 2\n#### 2"), ("p", "1"), ("q", "1 + 1\n#### 2")]
    rows = [{"prompt": p, "answer": a} for p, a in pairs]
    prompts = load(write(tmp_path / "d.jsonl", rows), tokenizer)
    assert [prompt.id for prompt in deduplicate(prompts)] == ["d:1", "d:2"]
    prompts = load(write(tmp_path / "d.jsonl", [*rows, {"prompt": "p", "answer": "3"}]), tokenizer)
    with pytest.raises(
        ValueError, match="d:1 and d:5 are the same prompt with different answers, '1' and '3'"
    ):
        deduplicate(prompts)
    remark = "\n\n#### Remark\nThere is another way."
    rows = [{"prompt": "p", "answer": f"It is \\boxed{{{n}}}.{remark}"} for n in (1, 2)]
    with pytest.raises(ValueError, match="d:1 and d:2 are the same prompt with different answers"):
        deduplicate(load(write(tmp_path / "d.jsonl", rows), tokenizer))


def test_gsm8k_rows_are_recognised(tmp_path, tokenizer):
    rows = [{"question": "1+1?", "answer": "1 + 1 = 2\n#### 2"}, {"prompt": "2+2?", "answer": 4}]
    first, second = load(write(tmp_path / "g.jsonl", rows), tokenizer)
    assert (first.text, first.answer) == ("1+1?", "1 + 1 = 2\n#### 2") and second.text == "2+2?"
    with pytest.raises(
        ValueError, match=r"g.jsonl, row 1: no key 'prompt'; the row has \['answer', 'question'\]"
    ):
        load(write(tmp_path / "g.jsonl", [{"question": "1+1?", "answer": "2"}]), tokenizer)


@pytest.mark.skipif(not AIME.is_file(), reason="no ../shared/data/aime-2024.parquet")
def test_the_aime_file_has_thirty_problems(tokenizer):
    prompts = load(AIME, tokenizer, apply_chat_template=True)
    distinct = deduplicate(prompts)
    assert (len(prompts), len(distinct)) == (960, 30)
    assert all(prompt.answer.isdigit() and 0 <= int(prompt.answer) <= 999 for prompt in distinct)


@pytest.mark.skipif(not GSM8K.is_file(), reason="no ../shared/data/gsm8k_test.jsonl")
def test_the_gsm8k_file_loads_whole(tokenizer):
    prompts = load(GSM8K, tokenizer, prompt_key="question")
    assert len(prompts) == 1319 and all("####" in prompt.answer for prompt in prompts)


@pytest.mark.parametrize(
    ("num_prompts", "batch_size"), [(10, 3), (7, 7), (13, 12), (1, 1), (100, 32), (17, 9)]
)
def test_cursor_sees_every_prompt_once_an_epoch(num_prompts, batch_size):
    cursor = PromptCursor(num_prompts, batch_size, seed=3, shuffle=True)
    steps = [cursor.indices(step) for step in range(4 * num_prompts)]
    assert all(len(set(step)) == len(step) == batch_size for step in steps)
    stream = [index for step in steps for index in step]
    epochs = [stream[start : start + num_prompts] for start in range(0, len(stream), num_prompts)]
    whole = [epoch for epoch in epochs if len(epoch) == num_prompts]
    assert all(sorted(epoch) == list(range(num_prompts)) for epoch in whole)
    if num_prompts >= 10:  # epochs differ in their order
        assert len({tuple(epoch) for epoch in whole}) == len(whole)


def test_cursor_depends_on_seed_and_step_alone():
    straight = PromptCursor(17, 5, seed=1, shuffle=True)
    expected = {step: straight.indices(step) for step in range(30)}
    wild = PromptCursor(17, 5, seed=1, shuffle=True)
    for step in (29, 0, 13, 13, 2, 28):
        assert wild.indices(step) == expected[step]
    assert PromptCursor(17, 5, seed=2, shuffle=True).indices(0) != expected[0]
    # Pinned: a resumed run must not depend on the release of a library.
    assert PromptCursor(8, 8, seed=0, shuffle=True).indices(0) == [3, 2, 1, 6, 0, 7, 4, 5]
    ordered = PromptCursor(4, 3, seed=0, shuffle=False)
    assert [ordered.indices(step) for step in range(3)] == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]


def test_cursor_refuses_nonsense():
    with pytest.raises(ValueError, match="num_prompts is 0"):
        PromptCursor(0, 1, seed=0, shuffle=True)
    with pytest.raises(ValueError, match="12 prompts a step, but the data have only 5"):
        PromptCursor(5, 12, seed=0, shuffle=True)
    with pytest.raises(ValueError, match="step is -1"):
        PromptCursor(1, 1, seed=0, shuffle=True).indices(-1)


def test_supervised_examples_end_with_eos(tmp_path, tokenizer, caplog):
    rows = [{"q": "ab", "r": "xyz"}, {"q": "cd", "r": "x<eos>"}, {"q": "ef", "r": "x" * 50}]
    path = write(tmp_path / "s.jsonl", rows)
    keys = {"prompt_key": "q", "response_key": "r"}
    with caplog.at_level(logging.WARNING):
        examples = load_supervised(path, tokenizer, **keys, apply_chat_template=True, max_tokens=40)
    assert "left out 1 of 3 examples" in caplog.text
    assert [tokenizer.decode(example.response_ids) for example in examples] == ["xyz<eos>", "x<eos>"]
    assert all(example.response_ids[-1] == 0 for example in examples)
    # Reinforcement learning continues from the same prompt tokens.
    rl = write(tmp_path / "p.jsonl", [{"prompt": "ab", "answer": "1"}])
    assert examples[0].prompt_ids == load(rl, tokenizer, apply_chat_template=True)[0].token_ids


@pytest.mark.parametrize(
    ("row", "complaint"),
    [({"q": "a"}, "no key 'r'"), ({"q": "a", "r": ""}, "'r' is empty"), ({"q": "a", "r": 1}, "'r' is a int")],
)
def test_malformed_supervised_rows_are_named(tmp_path, tokenizer, row, complaint):
    path = write(tmp_path / "s.jsonl", [{"q": "a", "r": "b"}, row])
    with pytest.raises(ValueError, match=f"s.jsonl, row 2: {complaint}"):
        load_supervised(
            path, tokenizer, prompt_key="q", response_key="r", apply_chat_template=False, max_tokens=9
        )
