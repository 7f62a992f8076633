"""The tool that replays one batch at several splits of a user's model."""

from __future__ import annotations

import json
import time
from pathlib import Path

import check_split_invariance as command
import psutil
import pytest
import split_check as tool
import torch
from patience import patience
from split_ranks import RankFailed, run_ranks
from split_replay import Replay
from splits import Split
from tiny import write_model

from megatron_dgpo.weights.convert import write_safetensors

SETTINGS = """
[model]
path = "{folder}"

[parallel]
timeout_seconds = {seconds}

[data]
train = ["{folder}/train.jsonl"]
max_prompt_tokens = 20
apply_chat_template = false

[rollout]
temperature = 0.8
max_new_tokens = 16

[reward]
name = "exact_match"

[algorithm]
name = "dgpo"
tau = 0.1
kappa = 0.5

[train]
steps = 1
prompts_per_step = 4
samples_per_prompt = 3
prompts_per_minibatch = 4

[optimizer]
lr = 1e-3
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A training config of a tiny model with a tokenizer of letters and a few prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = write_model(tmp_path_factory.mktemp("split_tool") / "model", tied=True)
    letters = Tokenizer(models.WordLevel({c: i for i, c in enumerate("#abcdefgh")}, unk_token="#"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="#").save_pretrained(folder)
    rows = [{"prompt": text, "answer": "b"} for text in ("abc", "hgfedcba", "d", "gaga", "fed")]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "train.toml"
    path.write_text(SETTINGS.format(folder=folder, seconds=patience()))
    return path


def test_every_split_agrees(config, tmp_path, capfd):
    file = tmp_path / "out.json"
    words = ("--config", config, "--samples", 3, "--response-tokens", 16, "--json", file)
    assert command.main([*map(str, words)]) == 0
    output = "".join(capfd.readouterr())
    assert "random tokens" not in output  # the prompts are those of data.train
    report = json.loads(file.read_text())
    rows = {row["name"]: row for row in report["splits"]}
    sizes = {(row["tp"], row["pp"], row["dp"], row["sequence_parallel"]) for row in rows.values()}
    wanted = {(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)}
    assert sizes == {(*w, False) for w in wanted} | {(*w, True) for w in wanted if w[0] == 2}
    for name, row in rows.items():
        assert row["status"] == ("rounding" if row["moved"] else "ok"), output
        found = row["differences"]
        assert all(found[key] <= 1e-5 for key in tool.COLUMNS), (name, found)
        assert len(row["microbatches"]) == row["dp"]
        assert ("small" in name) == (min(row["microbatches"]) > 1)
        assert name in output
    assert rows["TP=1"]["microbatches"] == [1]
    assert 1e-7 < rows["TP=1 moved"]["differences"]["gradient"] < 1e-5 <= report["bound"] < 3e-5
    step = rows["TP=1"]["metrics"]
    assert step["clip_fraction"] > 0.02 and step["hellinger"] > 1e-3 and step["credit_weight_variance"] > 1e-3
    assert report["verdict"].startswith("INVARIANT: 10 splits within") and report["verdict"] in output


def test_a_difference_above_the_bound_is_status_1(config, capsys):
    words = ("--config", config, "--max-world-size", 1, "--response-tokens", 16, "--bound", 0)
    assert command.main([*map(str, words)]) == 1
    assert "NOT INVARIANT: TP=1 small; bound 0" in capsys.readouterr().out


# --- what it would catch ------------------------------------------------------------------------------

GRADIENTS = {
    "model.norm.weight": torch.tensor([0.5, -2.0, 0.0]),
    "lm_head.weight": torch.tensor([[1e-3, 0.0], [0.0, -4e-3]]),
    "unused": torch.zeros(2),
}


def saved(folder: Path, **changes: torch.Tensor) -> Path:
    folder.mkdir()
    write_safetensors(iter((GRADIENTS | changes).items()), folder)
    return folder


def replay_of(loss=0.01, norm=3.0, weights=(0.5, 1.5), copies=(0.0, "")) -> Replay:
    metrics = {"loss": loss, "grad_norm": norm, "advantage_size": 0.8}
    return Replay(metrics, [1], [{("p1", 0): torch.tensor(weights)}], copies)


def compared(tmp_path, other: Replay, **changes: torch.Tensor) -> tool.Differences:
    return tool.compare(replay_of(), saved(tmp_path / "a"), other, saved(tmp_path / "b", **changes))


def test_equal_steps_do_not_differ(tmp_path):
    assert compared(tmp_path, replay_of()).largest() == 0


def test_a_wrong_gradient_is_found_and_named(tmp_path):
    wrong = GRADIENTS["lm_head.weight"].clone()
    wrong[1, 0] += 1e-6  # far below the other tensor's gradients
    found = compared(tmp_path, replay_of(), **{"lm_head.weight": wrong})
    assert found.gradient == pytest.approx(1e-6 / 4e-3, rel=1e-3)
    assert found.worst_parameter == "lm_head.weight" and found.largest() == found.gradient
    rows = [
        tool.Row(Split(1, 1, 1, False, 9), "TP=1", "ok", replay=replay_of()),
        tool.Row(Split(2, 1, 1, False, 9), "TP=2", "DIFFERS", replay=replay_of(), differences=found),
    ]
    assert "TP=2" in tool.verdict(rows, 1e-5) and "DIFFERS   lm_head.weight" in tool.table(rows)


def test_a_gradient_from_nothing_or_nan_is_infinitely_far(tmp_path):
    assert compared(tmp_path, replay_of(), unused=torch.tensor([0.0, 1e-9])).gradient == float("inf")
    nan = torch.tensor([float("nan"), 0.0])
    assert tool.worst_gradient(tmp_path / "a", saved(tmp_path / "c", unused=nan)) == (float("inf"), "unused")


def test_loss_norm_credit_and_copies_count_too(tmp_path):
    other = replay_of(loss=0.012, norm=3.003, weights=(0.5, 1.53), copies=(0.25, "model.norm.weight"))
    found = compared(tmp_path, other)
    assert (found.loss, found.norm) == (pytest.approx(0.002 / 0.8), pytest.approx(1e-3))
    assert (found.credit, found.copies) == (pytest.approx(0.02, rel=1e-5), 0.25)
    assert found.worst_parameter == "model.norm.weight" and found.gradient == 0


def test_other_tensors_or_responses_are_an_error(tmp_path):
    with pytest.raises(KeyError, match="only one split has a gradient of 'extra'"):
        compared(tmp_path, replay_of(), extra=torch.ones(1))
    other = replay_of()
    other.credit = [{("p2", 0): torch.ones(2)}]
    with pytest.raises(KeyError, match="only one split has credit"):
        tool.worst_credit(replay_of(), other)


# --- what cannot be run -------------------------------------------------------------------------------


def test_wrong_settings_are_status_2(config, tmp_path, capsys):
    def refused(*words: object) -> str:
        with pytest.raises(SystemExit) as end:
            command.main([*map(str, words)])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "error: model.path: " in refused("--config", config, "--model.path", tmp_path)
    assert "algorithm.tua: unknown key (did you mean algorithm.tau?)" in refused(
        "--config", config, "--algorithm.tua", 1
    )
    assert "cannot be read" in refused("--config", tmp_path / "none.toml")
    assert "the model has 64 positions" in refused("--config", config, "--response-tokens", 64)
    assert "-1 is below 0" in refused("--config", config, "--bound", -1)


def test_splits_that_do_not_fit_are_skipped_with_the_reason(config):
    c = command.load_config([str(config)])
    assert tool.why_not(c, Split(2, 2, 1, True, 99), 4) == ""
    assert "does not divide the model's 2 key/value heads" in tool.why_not(c, Split(4, 1, 1, False, 99), 4)
    assert "4 layers do not divide into 3 stages" in tool.why_not(c, Split(1, 3, 1, False, 99), 4)
    assert tool.why_not(c, Split(1, 1, 2, False, 99), 3) == "3 prompts do not divide by 2 replicas"


# --- processes ----------------------------------------------------------------------------------------


def fail_on_rank_1() -> None:
    rank = torch.distributed.get_rank()
    if rank == 1:
        raise ValueError("something is wrong here")
    torch.distributed.barrier()


def sleep_long() -> None:
    time.sleep(300)


def test_first_cause_time_out_and_no_process_left(tmp_path):
    def start(name: str, fn, limit: float) -> None:
        folder = tmp_path / name
        folder.mkdir()
        run_ranks(fn, 2, folder=folder, collective_seconds=patience(), limit_seconds=limit)

    with pytest.raises(RankFailed, match="rank 1: ValueError: something is wrong here"):
        start("fail", fail_on_rank_1, patience())
    with pytest.raises(TimeoutError, match="still run after 1 s"):
        start("sleep", sleep_long, 1)
    # The server that forks ranks stays until the caller ends, and no rank does.
    assert len([p for child in psutil.Process().children() for p in child.children()]) == 0
