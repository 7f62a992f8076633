"""Model folders as they come: vocab.json without tokenizer.json, several stop tokens, unknown fields."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import check_split_invariance
import convert_checkpoint
import pytest
from place import Place

from megatron_dgpo.cli import dump_toml
from megatron_dgpo.config import Config, SFTConfig
from megatron_dgpo.entry import parse
from megatron_dgpo.inputs import load_data, load_supervised_data, load_tokenizer
from megatron_dgpo.mcore.hf_config import ModelShape
from megatron_dgpo.weights.checkpoints import open_checkpoint

Capsys = pytest.CaptureFixture[str]


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def split_vocabulary(folder: Path) -> None:
    """tokenizer.json as the two files that byte-level BPE had before it."""
    read = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(read["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer.json").unlink()


def test_vocab_json_and_merges_txt_make_the_same_run(place: Place) -> None:
    def data() -> list[Any]:
        rl, sft = (parse(place.words(*of), schema) for *of, schema in (("train", Config), ("sft", SFTConfig)))
        read, examples = load_data(rl), load_supervised_data(sft)
        return [read.prompts, read.stop_ids, examples.examples, examples.stop_ids]

    before = data()
    split_vocabulary(place.model)
    assert data() == before


def test_every_stop_token_of_a_folder_and_the_settings_reaches_a_run(
    place: Place, caplog: pytest.LogCaptureFixture, capsys: Capsys
) -> None:
    eos = json.loads((place.model / "config.json").read_text())["eos_token_id"]
    change(place.model / "generation_config.json", eos_token_id=[7, eos])
    words = ["--rollout.stop_tokens", '["a", 8]']
    with caplog.at_level(logging.INFO):
        data = load_data(parse(place.words("train", *words), Config))
    letter = data.tokenizer("a")["input_ids"][0]
    assert data.stop_ids == (eos, 7, letter, 8)
    assert f"rollout: a response ends with '<eos>' ({eos}) or " in caplog.text
    sft = load_supervised_data(parse(place.words("sft", *words), SFTConfig))
    assert sft.stop_ids == data.stop_ids
    assert {eos, 7, 8} >= {example.response_ids[-1] for example in sft.examples} > {eos}
    with pytest.raises(SystemExit):
        parse(place.words("train", *words, "--dry-run"), Config)
    out = capsys.readouterr().out
    assert f"# rollout: a response ends with '<eos>' ({eos}) or " in out
    assert 'stop_tokens = ["a", 8]' in out


def test_ids_that_only_the_loaded_tokenizer_shows_are_checked(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which ids tokenizer.model has, its package says; this one is not read."""
    config = parse(place.words("train"), Config)
    tokenizer = load_tokenizer(config)
    (place.model / "tokenizer.json").rename(place.model / "tokenizer.model")
    monkeypatch.setattr("megatron_dgpo.data.tokenizer.load_tokenizer", lambda folder: tokenizer)
    assert load_tokenizer(parse(place.words("train"), Config)) is tokenizer
    change(place.model / "config.json", vocab_size=len(tokenizer) - 1)
    with pytest.raises(
        ValueError, match=f"ids go up to {len(tokenizer) - 1}, but config.json has vocab_size"
    ):
        load_tokenizer(config)


# --- fields of config.json ------------------------------------------------------------------------------

IGNORE = ["--model.ignore_config_fields", '["scale_depth"]']


def test_runs_say_once_what_they_pass_over(
    place: Place, caplog: pytest.LogCaptureFixture, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(place.model / "config.json", unsloth_fixed=True, scale_depth=1.4)
    config, sft = parse(place.words("train", *IGNORE), Config), parse(place.words("sft", *IGNORE), SFTConfig)
    for load in (lambda: load_data(config), lambda: load_supervised_data(sft)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load()
        warned = [r.getMessage() for r in caplog.records if "config.json" in r.getMessage()]
        assert len(warned) == 2
        assert warned[0].endswith("look like a change of the computation: unsloth_fixed")
        assert warned[1].endswith("ignored, as ignore_config_fields asks for: scale_depth = 1.4")
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    load_data(config)
    assert not [r for r in caplog.records if "config.json" in r.getMessage()]
    monkeypatch.delenv("RANK")
    with pytest.raises(SystemExit):
        parse(place.words("train", *IGNORE, "--dry-run"), Config)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("# model.path: ")] == [
        f"# model.path: {line}" for line in warned
    ]


def test_a_resumed_run_may_come_to_ignore_a_field(place: Place) -> None:
    run = place.folder / "run"
    (run / "checkpoints" / "step_00000003").mkdir(parents=True)
    (run / "config.toml").write_text(dump_toml(parse(place.words("train"), Config)))
    change(place.model / "config.json", scale_depth=1.4)
    assert parse(place.words("train", "--resume", *IGNORE), Config).model.ignore_config_fields == (
        "scale_depth",
    )
    with pytest.raises(SystemExit):
        parse(place.words("train", "--resume"), Config)


def test_splits_are_checked_with_ignored_fields(place: Place) -> None:
    change(place.model / "config.json", scale_depth=1.4)
    config = check_split_invariance.load_config(place.words("train", *IGNORE))
    assert ModelShape.of(config.model).vocab_size > 0


def test_the_converter_ignores_what_it_is_told_and_what_the_run_was_told(
    originals: Path, tmp_path: Path, capsys: Capsys
) -> None:
    source = shutil.copytree(originals / "one", tmp_path / "source")
    change(source / "config.json", scale_depth=1.4, unsloth_fixed=True)
    ignore = ["--ignore-config-fields", "scale_depth"]

    def run(*words: object) -> str:
        assert convert_checkpoint.main([*map(str, words)]) == 0
        return capsys.readouterr().err

    with pytest.raises(SystemExit):
        convert_checkpoint.main(["import", str(source), str(tmp_path / "imported")])
    assert "scale_depth 1.4 has no counterpart" in capsys.readouterr().err
    said = run("import", source, tmp_path / "imported", *ignore)
    assert "asks for: scale_depth = 1.4" in said and "computation: unsloth_fixed" in said
    run("export", tmp_path / "imported", tmp_path / "back", *ignore)
    assert (tmp_path / "back" / "config.json").read_text() == (source / "config.json").read_text()
    # A checkpoint of a run, which has its settings beside it and config.json where model.path is.
    step = tmp_path / "run" / "checkpoints" / "step_00000001"
    shutil.copytree(tmp_path / "imported", step)
    (step / "config.json").unlink()
    settings = f'[model]\npath = "{source}"\nignore_config_fields = ["scale_depth"]\n'
    (tmp_path / "run" / "config.toml").write_text(settings)
    if (step / "files.json").exists():
        listed = json.loads((step / "files.json").read_text())
        (step / "files.json").write_text(json.dumps({k: v for k, v in listed.items() if k != "config.json"}))
    assert open_checkpoint(step).ignored == ("scale_depth",)
    assert "asks for: scale_depth" in run("export", step, tmp_path / "again")
