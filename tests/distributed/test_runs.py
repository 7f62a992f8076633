"""Whole runs under torchrun: what they leave behind, killed and resumed, at several splits."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launch import ROOT, Launch
from patience import patience
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dgpo.cli import ConfigError
from megatron_dgpo.entry import claim
from megatron_dgpo.observe.advisories import read_advisories
from megatron_dgpo.observe.metrics import read_metrics, without_timings
from megatron_dgpo.torchrun import failures

QUICKSTART = ROOT / "examples" / "quickstart"
STEPS = 8
SMALL = (
    *("--train.steps", STEPS, "--train.prompts_per_step", 8, "--train.prompts_per_minibatch", 4),
    *(
        "--train.samples_per_prompt",
        4,
        "--rollout.max_new_tokens",
        64,
        "--parallel.timeout_seconds",
        patience(1200),
    ),
    *("--checkpoint.every", 2, "--evaluation.every", 4, "--evaluation.k", 2),
    *("--data.train", '["{data}/train.jsonl"]', "--evaluation.data", '["{data}/heldout.jsonl"]'),
    *("--model.path", "{coldstart}/hf"),
)
"""The quick start's DGPO run, made small. Two mini-batches a step: the second is off-policy."""


STEP_METRICS = {
    *("reward", "reward_failed", "zero_variance_groups", "truncated", "staleness", "packing_imbalance"),
    *("response_length", "response_length_max", "response_tokens", "tokens_per_second"),
    *("log_prob_gap", "log_prob_gap_max", "sync_log_prob_gap", "clip_fraction", "clip_low_fraction"),
    *("loss", "grad_norm", "learning_rate", "ratio_mean", "approx_kl", "kl_reference"),
    *("entropy", "entropy_normalized", "entropy_p10", "entropy_p50", "entropy_p90", "entropy_p99"),
    *("hellinger", "hellinger_p10", "hellinger_p50", "hellinger_p90", "hellinger_p99"),
    *(
        "credit_effective_fraction",
        "credit_weight_variance",
        "credit_weight_max",
        "credit_tau",
        "credit_kappa",
    ),
    *("credit_top1_share", "credit_top10_share", "memory/peak_rss_bytes"),
    *(
        f"credit_{what}_{side}"
        for what in ("effective_fraction", "top10_share")
        for side in ("right", "wrong")
    ),
    *(f"time/{phase}" for phase in ("step", "generate", "prepare", "update", "sync")),
}
"""Of a DGPO run's every step; the position correlation comes when weights first differ."""


class Workshop:
    """One folder for all runs of this file; makes data and a cold start once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data, self.coldstart = folder / "data", folder / "coldstart"
        size = ("--seed", "3", "--traces", "2000", "--train-prompts", "64", "--heldout-prompts", "8")
        make_data(QUICKSTART / "make_data.py", "--out", self.data, *size)

    def launch(
        self, name: str, *words: object, nproc: int = 2, module: str = "megatron_dgpo.train", **how: Any
    ) -> Launch:
        """A DGPO run in folder `name`."""
        filled = [str(w).format(data=self.data, coldstart=self.coldstart) for w in (*SMALL, *words)]
        words = (QUICKSTART / "dgpo.toml", "--run.folder", self.folder / name, *filled)
        log = self.folder / f"{name}.{time.time():.2f}.log"
        return Launch(module, nproc, words, log, **how)

    def cold_start(self) -> Launch:
        words = (QUICKSTART / "sft.toml", "--run.folder", self.coldstart, "--train.steps", 120)
        words += ("--model.path", self.data / "model", "--data.train", f'["{self.data}/sft.jsonl"]')
        words += ("--evaluation.data", f'["{self.data}/heldout.jsonl"]', "--evaluation.k", 2)
        words += ("--optimizer.warmup_steps", 0, "--parallel.timeout_seconds", patience(1200))
        return Launch("megatron_dgpo.sft", 2, words, self.folder / "coldstart.log", cold=True)

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [without_timings(row) for row in read_metrics(self.folder / name)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    workshop = Workshop(tmp_path_factory.mktemp("runs"))
    workshop.cold_start().succeed()
    return workshop


@pytest.fixture(scope="module")
def whole(shop: Workshop) -> Launch:
    """The run that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGPO_PROGRESS_SECONDS", "0.02")  # before the first line of progress
        return shop.launch("whole", cold=True).succeed()


def test_cold_start_learns_and_exports(shop: Workshop) -> None:
    losses = [row["loss"] for row in shop.rows("coldstart") if row["phase"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    policy = AutoModelForCausalLM.from_pretrained(shop.coldstart / "hf")
    assert all(torch.isfinite(p).all() for p in policy.parameters())


def test_run_folder_holds_what_is_needed_to_trust_it(shop: Workshop, whole: Launch) -> None:
    folder, rows = shop.folder / "whole", shop.rows("whole")
    train = [row for row in rows if row["phase"] == "train"]
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if row["phase"] == "eval"] == [0, 4, 8]
    # The engine samples from the weights that the trainer holds, at every step.
    assert max(row["log_prob_gap"] for row in train) < 1e-4
    for name in ("config.toml", "versions.json", "tensorboard", "samples"):
        assert (folder / name).exists(), name
    for row in read_metrics(folder, "train"):
        assert STEP_METRICS <= row.keys(), STEP_METRICS - row.keys()
        assert all(math.isfinite(value) for name, value in row.items() if name != "phase")
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept[-1] == "step_00000008" and not [name for name in kept if name.endswith(".partial")]
    for step in range(1, STEPS + 1):
        assert f"step {step}/{STEPS}" in whole.output.replace("step  ", "step ")


def test_a_log_shows_how_far_long_work_is(shop: Workshop, whole: Launch) -> None:
    lines = [line.partition(": ") for line in whole.output.splitlines()]
    said = {name: text for name, _, text in lines if re.search(r"(^|in )[0-9]+ s\b", text)}
    for name, counts in {
        "rollout": r"[0-9]+ of [0-9]+ samples of rank 0 in ",
        "evaluation at step 4": r"[0-9]+ of [0-9]+ samples of rank 0 in ",
        "prepare": r"[0-9]+ of [0-9]+ micro-batches in ",
        "update": r"[0-9]+ of [0-9]+ micro-batches in ",
        f"saving {shop.folder}/whole/checkpoints/step_00000008": "",
    }.items():
        assert re.match(rf"(done, )?{counts}[0-9]+ s", said[name]), (name, said.get(name))
    assert "\r" not in whole.output


def test_advisories_say_that_credit_is_uniform_here(shop: Workshop, whole: Launch) -> None:
    """At the paper's tau = 1 every weight is near 1 with so small a model."""
    folder = shop.folder / "whole"
    found = read_advisories(folder)
    assert [(row["name"], row["step"]) for row in found] == [("uniform_credit", 5)]
    line = f"advisory at step 5, uniform_credit: {found[0]['message']}. Suggestion: {found[0]['suggestion']}"
    assert line in whole.output
    assert f"uniform_credit: {folder / 'advisories.jsonl'}" in whole.output
    assert f"python tools/credit_report.py {folder}" in whole.output
    assert f"python -m megatron_dgpo.observe.inspect {shop.folder}" in whole.output


def test_exported_policy_generates_with_transformers(shop: Workshop, whole: Launch) -> None:
    folder = shop.folder / "whole" / "hf"
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "a=3,b=a+4,b?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = policy.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert ids.shape[1] > prompt["input_ids"].shape[1]
    start = AutoModelForCausalLM.from_pretrained(shop.coldstart / "hf")
    moved = [not torch.equal(a, b) for a, b in zip(policy.parameters(), start.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize(
    ("name", "nproc", "tp", "pp"), [("tp1", 1, 1, 1), ("pp2", 2, 1, 2), ("dp2", 2, 1, 1)]
)
def test_first_step_does_not_depend_on_the_split(
    shop: Workshop, whole: Launch, name: str, nproc: int, tp: int, pp: int
) -> None:
    split = ("--parallel.tensor_model_parallel_size", tp, "--parallel.pipeline_model_parallel_size", pp)
    if pp > 1:  # the model has three layers
        split += ("--model.transformer.num_layers_in_first_pipeline_stage", 1)
    shop.launch(name, *split, "--train.steps", 2, nproc=nproc).succeed()
    wanted = next(row for row in shop.rows("whole") if row["phase"] == "train")
    got = next(row for row in shop.rows(name) if row["phase"] == "train")
    assert got.keys() == wanted.keys()
    assert got["response_tokens"] == wanted["response_tokens"]
    assert wanted["grad_norm"] > 0
    assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    # The advantages of a group cancel, so that the loss is near 0 and its error is measured against 1.
    quantiles = [name for name in wanted if name.startswith(("entropy_p", "hellinger_p"))]
    assert len(quantiles) == 8
    for metric in ("loss", "reward", "entropy", "response_length_max", *quantiles):
        assert got[metric] == pytest.approx(wanted[metric], abs=1e-5), metric


def test_killed_runs_go_on_as_if_nothing_had_happened(shop: Workshop, whole: Launch) -> None:
    moments, name = random.Random(5), "killed"
    for attempt in range(3):
        run = shop.launch(name, *(["--resume"] if attempt else []))
        wanted = 1 + attempt * 2
        run.wait_until(lambda n=wanted: steps_done(shop.folder / name) >= n)  # type: ignore[misc]
        time.sleep(moments.uniform(0, 1.0))
        run.kill()
    shop.launch(name, "--resume").succeed()
    assert shop.rows(name) == shop.rows("whole")
    assert read_advisories(shop.folder / name) == read_advisories(shop.folder / "whole")


def test_sigterm_saves_and_resume_completes_the_run(shop: Workshop, whole: Launch) -> None:
    run = shop.launch("stopped", "--checkpoint.every", 0)
    run.wait_until(lambda: steps_done(shop.folder / "stopped") >= 1)
    run.terminate_workers()
    run.succeed()
    done = steps_done(shop.folder / "stopped")
    assert 1 <= done < STEPS
    assert (shop.folder / "stopped" / "checkpoints" / f"step_{done:08d}").is_dir()
    assert "--resume" in run.output
    shop.launch("stopped", "--resume", "--checkpoint.every", 0).succeed()
    assert shop.rows("stopped") == shop.rows("whole")


def test_ppo_goes_on_with_its_critic(shop: Workshop) -> None:
    """The first step trains the value model alone, so that a resumed run shows what its optimizer holds."""
    ppo = ("--algorithm.name", "ppo", "--algorithm.critic_lr", 1e-3, "--algorithm.critic_warmup_steps", 1)
    shop.launch("ppo", *ppo).succeed()
    rows = [row for row in shop.rows("ppo") if row["phase"] == "train"]
    assert "loss" not in rows[0] and all("loss" in row for row in rows[1:])
    assert rows[0]["value"] == 0.0 and rows[-1]["value"] > 0.0
    run = shop.launch("ppo_stopped", *ppo, "--checkpoint.every", 0)
    run.wait_until(lambda: steps_done(shop.folder / "ppo_stopped") >= 2)
    run.terminate_workers()
    run.succeed()
    assert 2 <= steps_done(shop.folder / "ppo_stopped") < STEPS
    shop.launch("ppo_stopped", *ppo, "--resume", "--checkpoint.every", 0).succeed()
    assert shop.rows("ppo_stopped") == shop.rows("ppo")


def test_an_algorithm_of_the_users_own(shop: Workshop) -> None:
    recipe = ROOT / "examples" / "custom_algorithm" / "algorithm.toml"
    shop.launch("cispo", recipe, "--train.steps", 3).succeed()
    rows = [row for row in shop.rows("cispo") if row["phase"] == "train"]
    assert len(rows) == 3 and all(row["grad_norm"] > 0 for row in rows)
    # At the reference there is no distance; then tau is such that credit is as concentrated as asked for.
    fractions = [row["credit_effective_fraction"] for row in rows]
    assert fractions[0] == 1.0 and fractions[1:] == pytest.approx([0.9, 0.9], abs=1e-5)


def test_torchrun_starts_again_what_a_dead_rank_ended(
    shop: Workshop, whole: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --resume too, what is started again goes on from the last checkpoint, or from the start."""
    deaths = [(0, "start", 0), (1, "rollout", 1), (1, "update", 3), (0, "save", 4), (1, "sync", 5)]
    monkeypatch.setenv("DIES", json.dumps(deaths))
    run = shop.launch("restarted", module="dies", max_restarts=len(deaths)).succeed()
    assert shop.rows("restarted") == shop.rows("whole")
    assert read_advisories(shop.folder / "restarted") == read_advisories(shop.folder / "whole")
    assert [n for n in (2, 4) if f"step_{n:08d}: {n} steps done" in run.output] == [2, 4]


def test_a_dead_rank_ends_the_run(shop: Workshop) -> None:
    run = shop.launch("dead")
    run.wait_until(lambda: steps_done(shop.folder / "dead") >= 1)
    workers = run.workers()
    workers[1].kill()
    assert run.wait() != 0  # long before a collective's time-out
    assert not [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL], ids=lambda sign: sign.name)
def test_ranks_save_and_end_with_torchrun(shop: Workshop, sign: signal.Signals) -> None:
    name = f"torchrun-{sign.name}"
    run = shop.launch(name, "--checkpoint.every", 0, cold=True)
    run.wait_until(lambda: steps_done(shop.folder / name) >= 1)
    workers = run.workers()
    with pytest.raises(ConfigError, match="another run is writing"):
        claim(shop.folder / name)
    run.process.send_signal(sign)
    _, alive = psutil.wait_procs(workers, timeout=patience())  # no collective waits for so short a time
    assert not alive
    assert list((shop.folder / name / "checkpoints").glob("step_*"))
    lock = claim(shop.folder / name)
    assert lock is not None
    lock.close()
    run.wait()


def test_a_step_without_rewards_changes_nothing_and_goes_on(shop: Workshop) -> None:
    tiny = (
        "--train.prompts_per_step",
        2,
        "--train.prompts_per_minibatch",
        2,
        "--train.samples_per_prompt",
        2,
    )
    unreadable = shop.folder / "unreadable.jsonl"  # gold answers that no response can be compared with
    rows = [json.loads(line) for line in (shop.data / "train.jsonl").read_text().splitlines()]
    unreadable.write_text("".join(json.dumps(row | {"answer": "?"}) + "\n" for row in rows))
    failing = ("--reward.name", "math_verify", "--data.train", json.dumps([str(unreadable)]))
    more = ("--parallel.tensor_model_parallel_size", 1, "--evaluation.data", "[]", "--train.steps", 2)
    run = shop.launch("unscored", *tiny, *failing, *more, nproc=1).succeed()
    assert [row["reward_failed"] for row in shop.rows("unscored")] == [1.0, 1.0]
    assert "no sample of this step has a reward" in run.output
    before = AutoModelForCausalLM.from_pretrained(shop.coldstart / "hf")
    after = AutoModelForCausalLM.from_pretrained(shop.folder / "unscored" / "hf")
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_that_is_not_finite_stops_all_ranks_and_saves_the_batch(shop: Workshop) -> None:
    """The same again after one restart ends the run, though torchrun has more left."""
    run = shop.launch("overflow", "--optimizer.lr", "1e30", "--evaluation.data", "[]", max_restarts=5)
    assert run.wait() != 0
    assert "gradient norm" in run.output
    assert "NonFiniteUpdate before the first step, 2 times in a row" in run.output
    found = failures(shop.folder / "overflow", 0)
    assert [row["error"] for row in found] == ["NonFiniteUpdate"] * 2
    saved = list((shop.folder / "overflow").glob("bad_batch_rank*.pt"))
    assert len(saved) == 2
    batch = torch.load(saved[0], weights_only=False)
    assert batch.num_tokens == sum(len(s.token_ids) for s in batch.samples) > 0


def test_two_steps_on_real_text(tmp_path: Path) -> None:
    data = ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl"
    if not data.exists():
        pytest.skip("no GSM8K problems beside the checkout")
    smoke = ROOT / "examples" / "gsm8k_smoke"
    make_data(smoke / "prepare.py", "--data", data, "--out", tmp_path)
    words = (smoke / "dgpo.toml", "--run.folder", tmp_path / "run", "--model.path", tmp_path / "model")
    words += ("--data.train", json.dumps([str(tmp_path / "train.jsonl")]))
    words += ("--evaluation.data", json.dumps([str(tmp_path / "heldout.jsonl")]))
    Launch("megatron_dgpo.train", 2, words, tmp_path / "log").succeed()
    rows = read_metrics(tmp_path / "run", "train")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["log_prob_gap"] < 1e-4 for row in rows)


def make_data(script: Path, *words: object) -> None:
    """Run an example's data script."""
    subprocess.run([sys.executable, script, *map(str, words)], check=True, timeout=patience())


def steps_done(folder: Path) -> int:
    """The last step whose metrics are written."""
    try:
        return max((row["step"] for row in read_metrics(folder, "train")), default=0)
    except FileNotFoundError:
        return 0
