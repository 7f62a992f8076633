"""Tokenizers as model folders have them: files, special tokens around a prompt, and what ends a response."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_dgpo.data import load_prompts, load_supervised
from megatron_dgpo.data import tokenizer as module
from megatron_dgpo.data.tokenizer import encode, load_tokenizer, stop_token_ids

BOS, EOS, END, UNK = "<s>", "</s>", "<|end|>", "<unk>"
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789+=? \n"
IDS = {token: i for i, token in enumerate([BOS, EOS, UNK, *LETTERS, "ab", END])}
VOCAB = len(IDS) + 4


def made(around: str = "", unk: bool = True, **more: Any) -> PreTrainedTokenizerFast:
    """One token a character, and "ab"; `around`: what its post-processor makes of a text."""
    merges = [("a", "b")]
    bpe = Tokenizer(models.BPE(vocab=IDS, merges=merges, unk_token=UNK if unk else None))
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    bpe.decoder = decoders.Fuse()
    if around:
        special = [(token, IDS[token]) for token in (BOS, EOS)]
        bpe.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    given = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "additional_special_tokens": [END]}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **{**given, **more})


def ids(text: str) -> tuple[int, ...]:
    return tuple(IDS[c] for c in text)


# --- prompts --------------------------------------------------------------------------------------------

AROUND = {
    "nothing": ("", ()),
    "BOS": (f"{BOS} $A", (BOS,)),
    "BOS and EOS": (f"{BOS} $A {EOS}", (BOS,)),
    "EOS": (f"$A {EOS}", ()),
    "two": (f"{BOS} {EOS} $A {EOS}", (BOS, EOS)),
}


@pytest.mark.parametrize("kind", AROUND)
def test_a_prompt_begins_once_with_what_belongs_before_it_and_ends_as_it_ends(kind, caplog):
    around, first = AROUND[kind]
    before = tuple(IDS[token] for token in first)
    tokenizer, texts = made(around), ["c+d=?", "?", f"c{EOS}"]
    bare = [ids("c+d=?"), ids("?"), (*ids("c"), IDS[EOS])]
    with caplog.at_level(logging.WARNING):
        assert encode(tokenizer, texts, add_special_tokens=True) == [(*before, *row) for row in bare]
        assert encode(tokenizer, texts, add_special_tokens=False) == bare
        assert encode(tokenizer, [""], add_special_tokens=True) == [before]
    assert not caplog.records
    rendered = ["".join(first) + text for text in texts]
    with caplog.at_level(logging.WARNING):
        assert encode(tokenizer, [*rendered, "e"], add_special_tokens=True) == [
            *((*before, *row) for row in bare),
            (*before, *ids("e")),
        ]
    warned = [record.getMessage() for record in caplog.records]
    assert warned == [
        f"3 of 4 distinct prompts begin with {''.join(first)}, which the tokenizer puts before a text: it is "
        "not put there a second time"
    ] * bool(before)


def test_a_tokenizer_that_cannot_encode_the_probes_is_asked_with_the_texts():
    tokenizer = made(f"{BOS} $A {EOS}", unk=False, unk_token=None)
    vocabulary = {token: i for token, i in IDS.items() if token in (BOS, EOS, "c", "?")}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[])
    want = [(IDS[BOS],), (IDS[BOS], IDS["c"], IDS["?"])]
    assert encode(tokenizer, [BOS, "c?"], add_special_tokens=True) == want


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_of_runs_and_evaluations_and_examples_begin_alike(tmp_path):
    rows = [{"prompt": p, "answer": "1", "response": "ab"} for p in ("c+d", f"{BOS}c+d")]
    path, tokenizer = written(tmp_path / "rows.jsonl", rows), made(f"{BOS} $A {EOS}")
    how: dict[str, Any] = {"prompt_key": "prompt", "apply_chat_template": False}
    prompts = load_prompts(path, tokenizer, answer_key="answer", **how)
    examples = load_supervised(path, tokenizer, response_key="response", max_tokens=99, **how)
    want = (IDS[BOS], *ids("c+d"))
    assert [p.token_ids for p in prompts] == [e.prompt_ids for e in examples] == [want, want]
    assert [e.response_ids for e in examples] == [(IDS["ab"], IDS[EOS])] * 2


def test_a_template_that_renders_bos_has_it_once_and_a_rendered_prompt_in_it_is_noticed(tmp_path, caplog):
    tokenizer = made(f"{BOS} $A {EOS}")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}="
    path = written(tmp_path / "p.jsonl", [{"prompt": "c+d", "answer": "1"}])
    how: dict[str, Any] = {"prompt_key": "prompt", "answer_key": "answer", "apply_chat_template": True}
    with caplog.at_level(logging.WARNING):
        (prompt,) = load_prompts(path, tokenizer, **how)
    assert prompt.token_ids == (IDS[BOS], *ids("c+d=")) and not caplog.records
    written(path, [{"prompt": p, "answer": "1"} for p in ("c", f"{END}d", f"{BOS}e")])
    with caplog.at_level(logging.WARNING):
        load_prompts(path, tokenizer, **how)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}, row 2: a message begins with a special token and goes")


# --- what ends a response -------------------------------------------------------------------------------


def folder_with(folder: Path, generation: Any = None, config: Any = None) -> Path:
    for name, eos in (("generation_config.json", generation), ("config.json", config)):
        if eos is not None:
            (folder / name).write_text(json.dumps({"eos_token_id": eos}))
    return folder


@pytest.mark.parametrize(
    ("generation", "config", "more", "want"),
    [
        (None, None, (), (1,)),
        ([40, 1, 3], 5, (), (1, 40, 3, 5)),
        (4, [5, 4], (), (1, 4, 5)),
        ([40, VOCAB, 9999], None, (), (1, 40)),  # ids that are never drawn
        (None, None, (7, "ab", END, "\n", 7), (1, 7, IDS["ab"], IDS[END], IDS["\n"])),
    ],
)
def test_everything_that_a_folder_and_a_user_name_ends_a_response(tmp_path, generation, config, more, want):
    folder = folder_with(tmp_path, generation, config)
    assert stop_token_ids(folder, made(), more, vocab_size=VOCAB) == want


def test_a_tokenizer_without_eos_leaves_it_to_the_others(tmp_path):
    tokenizer = made(eos_token=None)
    assert stop_token_ids(tmp_path, tokenizer, vocab_size=VOCAB) == ()
    assert stop_token_ids(folder_with(tmp_path, [9, 8]), tokenizer, vocab_size=VOCAB) == (9, 8)
    beyond = made()
    assert beyond.add_special_tokens({"eos_token": "<|new|>"}) and beyond.eos_token_id == len(IDS)
    assert stop_token_ids(tmp_path, beyond, vocab_size=len(IDS)) == (9, 8)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("abc", "'abc' is 2 tokens of this model and not one; use a text that is one, or ids"),
        ("", "'' is 0 tokens of this model"),
        ("\u2603", "'\u2603' is no token of this model's vocabulary"),
        (VOCAB, f"{VOCAB} is no token id below the model's {VOCAB}"),
        (-1, "-1 is no token id below"),
    ],
)
def test_a_setting_that_names_no_token_is_refused(tmp_path, more, says):
    with pytest.raises(ValueError) as caught:
        stop_token_ids(tmp_path, made(), (more,), vocab_size=VOCAB)
    assert str(caught.value).startswith(f"rollout.stop_tokens: {says}")


@pytest.mark.parametrize("eos", ["</s>", True, [1, None], -3, 1.5])
def test_a_file_whose_eos_is_no_id_is_named(tmp_path, eos):
    with pytest.raises(
        ValueError, match=r"generation_config.json: eos_token_id has .*, which is no token id"
    ):
        stop_token_ids(folder_with(tmp_path, eos), made(), vocab_size=VOCAB)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json is not valid JSON"):
        stop_token_ids(tmp_path, made(), vocab_size=VOCAB)


def test_a_supervised_response_ends_with_one_that_ends_a_response(tmp_path):
    rows = [{"q": "c", "r": "ab"}, {"q": "c", "r": f"ab{END}"}, {"q": "c", "r": f"ab{EOS}"}]
    path = written(tmp_path / "s.jsonl", rows)
    how: dict[str, Any] = {"prompt_key": "q", "response_key": "r", "apply_chat_template": False}
    for stops, ends in (((IDS[EOS], IDS[END]), (EOS, END, EOS)), ((IDS[END], 3), (END, END, EOS + END))):
        examples = load_supervised(path, made(), **how, max_tokens=9, stop_ids=stops)
        assert [made().decode(e.response_ids) for e in examples] == ["ab" + end for end in ends]


# --- files ----------------------------------------------------------------------------------------------


def test_vocab_json_with_merges_txt_is_the_tokenizer_that_it_came_from(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "ab", "\u0120ab", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n\u0120 ab\n")
    text, want = "ab ab c", [vocabulary["ab"], vocabulary["\u0120ab"], *(vocabulary[c] for c in "\u0120c")]
    for family, settings in (("qwen2", None), ("llama", {"tokenizer_class": "GPT2Tokenizer"})):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        if settings:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer(text)["input_ids"] == want and tokenizer.decode(want) == text
        assert tokenizer.eos_token_id == vocabulary["<|endoftext|>"]


@pytest.mark.parametrize(("first", "package"), [(b"\n", "sentencepiece"), (b"YQ== 0\n", "tiktoken")])
def test_a_package_that_is_missing_is_named(first, package, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_bytes(first + b"\x0e")
    missing = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda n: None if n == package else missing(n))
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == (
        f"the tokenizer of {tmp_path} cannot be loaded: its tokenizer.model needs the package {package} "
        f"(pip install {package})"
    )


def test_a_tokenizer_that_cannot_be_loaded_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"the tokenizer of {tmp_path} cannot be loaded: ")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_is_loaded_as_transformers_loads_it(tmp_path):
    made(f"{BOS} $A").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    mine, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert mine("ab c")["input_ids"] == theirs("ab c")["input_ids"] and type(mine) is type(theirs)
