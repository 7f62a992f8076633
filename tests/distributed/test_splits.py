"""One batch at every split: loss, gradient, credit and weights after the step, against plain torch.

The reference here is transformers' model and the formulas of arXiv 2605.03327, written out sample by
sample in float64 behind float32 logits; it uses nothing of the product's algorithms or ops.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from spawn import run_ranks
from spread_reference import spread, token_quantiles
from tiny import (
    SPLITS,
    VOCAB,
    config,
    hf_model,
    hf_tensors,
    scored_groups,
    sequences,
    split,
    write_model,
    write_perturbed,
)

from megatron_dgpo.config import OptimizerConfig, SFTConfig
from megatron_dgpo.config.algorithms import DAPOConfig, DGPOConfig, GRPOConfig, GSPOConfig, ReinforceConfig

TEMPERATURE, TAU, KAPPA, CLIP_LOW, CLIP_HIGH = 0.8, 0.03, 0.5, 0.2, 0.28
EPS = 1e-6
CASES = {
    "tied": {"tied": True, "timing": "rollout", "aggregation": "sequence_mean", "cap": 0.0},
    "untied": {"tied": False, "timing": "rollout", "aggregation": "sequence_mean", "cap": 0.0},
    "at update": {"tied": False, "timing": "update", "aggregation": "token_mean", "cap": 2.0},
}
WORLD_1 = {"TP=1": ({}, 4096), "TP=1, micro-batches": ({}, 30)}
WORLD_2 = {
    "DP=2": (SPLITS["DP=2"], 30),
    "TP=2": (SPLITS["TP=2"], 4096),
    "TP=2 SP": (SPLITS["TP=2 SP"], 30),
    "PP=2": (SPLITS["PP=2"], 30),
}
WORLD_4 = {
    "TP=2 PP=2": ({"tp": 2, "pp": 2}, 4096),
    "TP=2 PP=2 SP": ({"tp": 2, "pp": 2, "sp": True}, 30),
}
WORLDS: dict[int, dict[str, Any]] = {1: WORLD_1, 2: WORLD_2, 4: WORLD_4}
"""Processes -> name -> split and tokens of a micro-batch."""
NAMES = [name for splits in WORLDS.values() for name in splits]
LINEAR = OptimizerConfig(lr=1.0, adam_eps=1.0, weight_decay=0.0, clip_grad=0.0)
"""Adam's first step moves a weight by lr g / (|g| + eps) (bias correction undoes both averages). With
lr = eps = 1 that is nearly g itself, so the weights after the step tell every gradient; with the usual
eps it would tell little more than its sign."""


OTHERS = {
    "auto": DGPOConfig(tau="auto", effective_fraction=0.6),
    "gspo": GSPOConfig(clip_low=0.02, clip_high=0.02, credit="distribution", tau=TAU),
    "reinforce": ReinforceConfig(sequence_mask_cap=5.0),
    "dapo": DAPOConfig(),
}
"""Whose formulas tests/unit/test_algorithm_variants.py checks."""


CORRECTED = GRPOConfig(tis_cap=1.1, sequence_mask_cap=5.0)
WITHOUT_A_PASS = ("TP=1, micro-batches", "DP=2", "TP=2 PP=2 SP")


def dgpo(case):
    return DGPOConfig(
        tau=TAU,
        kappa=KAPPA,
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
        advantage_eps=EPS,
        credit_timing=case["timing"],
        aggregation=case["aggregation"],
        tis_cap=case["cap"],
    )


def my_minibatches(learner, groups):
    """This replica's share of the samples, packed."""
    mine = scored_groups()[groups.dp.rank() :: groups.dp.size()]
    learner.algorithm.assign_advantages(mine)
    return learner.pack([learner.algorithm.select(mine)])


def build(c, groups):
    from megatron_dgpo.algorithms import build_algorithm
    from megatron_dgpo.learner import Learner
    from megatron_dgpo.run import build_policy

    algorithm = build_algorithm(c.algorithm, vocab_size=VOCAB)
    policy = build_policy(c, groups, total_updates=4, keep_reference=algorithm.needs_reference)
    return policy, Learner(
        policy,
        algorithm,
        temperature=c.rollout.temperature,
        max_tokens=c.train.max_tokens_per_microbatch,
    )


def exported(policy):
    from megatron_dgpo.weights.export import export_stream

    return {name: tensor.clone() for name, tensor in export_stream(policy.model, policy.groups)}


def credit(minibatch, groups):
    """(prompt, sample) -> token weights, where they are."""
    from megatron_dgpo.data.packing import unpack

    if not groups.is_last_stage or "credit_weights" not in minibatch.batches[0].features:
        return {}
    values = [b.features["credit_weights"] for b in minibatch.batches]
    rows = unpack(minibatch.batches, values, len(minibatch.samples))
    return {(s.prompt.id, s.index): w.clone() for s, w in zip(minibatch.samples, rows, strict=True)}


def off_policy_update(folder, case, algorithm, kwargs, max_tokens):
    """One update with a reference, an old and a current policy that all differ."""
    from megatron_dgpo.run import merge_over_ranks
    from megatron_dgpo.weights.convert import folder_source, load_hf

    kind = "tied" if case["tied"] else "untied"
    c = config(
        folder / f"{kind}_reference",
        max_tokens=max_tokens,
        optimizer=LINEAR,
        algorithm=algorithm,
        temperature=TEMPERATURE,
        **kwargs,
    )
    with split(c) as groups:
        policy, learner = build(c, groups)
        load_hf(policy.model, groups, *folder_source(folder / f"{kind}_old"))
        (minibatch,) = my_minibatches(learner, groups)
        sums = learner.prepare([minibatch])
        load_hf(policy.model, groups, *folder_source(folder / f"{kind}_current"))
        sums.merge(learner.update(minibatch, save_bad_batch_to=folder))
        return {
            "metrics": merge_over_ranks(sums, groups),
            "weights": exported(policy),
            "credit": credit(minibatch, groups),
            "microbatches": len(minibatch.batches),
            "positions": sum(b.num_tokens for b in minibatch.batches),
            "shared": sum(p >= 0 for b in minibatch.batches for p in b.shared_prompts),
        }


def on_policy_updates(folder, algorithm, kwargs, max_tokens, only_update=False):
    """Metrics and weights of two rollout batches, the first of which has policy = reference."""
    from megatron_dgpo.run import merge_over_ranks

    usual = OptimizerConfig(lr=1e-2)
    c = config(
        folder / "untied_reference", max_tokens=max_tokens, optimizer=usual, algorithm=algorithm, **kwargs
    )
    out = []
    with split(c) as groups:
        policy, learner = build(c, groups)
        for _ in range(2):
            (minibatch,) = my_minibatches(learner, groups)
            sums = learner.prepare([minibatch], only_update=only_update)
            sums.merge(learner.update(minibatch, save_bad_batch_to=folder))
            metrics = merge_over_ranks(sums, groups)
            out.append((metrics, exported(policy), credit(minibatch, groups)))
    return out


def supervised_update(folder, kwargs, max_tokens):
    from megatron_dgpo.coldstart import batch_of_step, global_sum
    from megatron_dgpo.data.supervised import SupervisedExample
    from megatron_dgpo.learner import supervised_loss
    from megatron_dgpo.run import build_policy

    model = folder / "tied_reference"
    c = config(model, optimizer=LINEAR, **kwargs)
    sft = SFTConfig.model_validate(
        {
            "model": {"path": model},
            "data": {"train": (model,)},
            "train": {"steps": 1, "batch_size": 9, "max_tokens_per_microbatch": max_tokens},
            "optimizer": {"lr": 1.0},
        }
    )
    with split(c) as groups:
        policy = build_policy(c, groups, total_updates=1, keep_reference=False)
        examples = [SupervisedExample(*pair) for pair in sequences()]
        batches = batch_of_step(examples, sft, groups)
        result = policy.update(batches, supervised_loss(policy))
        loss = global_sum(sum(float(x) for x in result.metrics), groups)
        return {
            "metrics": {"loss": loss, "grad_norm": result.grad_norm},
            "weights": exported(policy),
        }


def work(rank, world_size, folder):
    results = {}
    for name, how in WORLDS[world_size].items():
        for case, options in CASES.items():
            results[name, case] = off_policy_update(folder, options, dgpo(options), *how)
        for other, algorithm in OTHERS.items():
            results[name, other] = off_policy_update(folder, CASES["untied"], algorithm, *how)
        results[name, "sft"] = supervised_update(folder, *how)
        for algorithm in (DGPOConfig(tau=0.01), GRPOConfig()):
            results[name, algorithm.name] = on_policy_updates(folder, algorithm, *how)
        if name in WITHOUT_A_PASS:
            for only_update in (False, True):
                results[name, only_update] = on_policy_updates(folder, CORRECTED, *how, only_update)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("splits")
    for kind in ("tied", "untied"):
        write_model(path / f"{kind}_reference", tied=kind == "tied", num_hidden_layers=2)
        write_perturbed(path / f"{kind}_reference", path / f"{kind}_old", seed=2, scale=0.05)
        write_perturbed(path / f"{kind}_old", path / f"{kind}_current", seed=3, scale=0.03)
    return path


@pytest.fixture(scope="module")
def results(folder):
    """(name, what) -> one result a rank."""
    ranks = [run_ranks(work, world, folder) for world in WORLDS]
    return {key: [rank[key] for rank in world] for world in ranks for key in world[0]}


# --- the reference ------------------------------------------------------------------------------------


def response_logits(model, prompt, response):
    """(r, VOCAB) float64, over the temperature."""
    z = model(torch.tensor([[*prompt, *response][:-1]])).logits[0]
    return z[len(prompt) - 1 :].double() / TEMPERATURE


def paper_advantages(group):
    """Eq. 1 over the samples whose reward is known."""
    known = [s for s in group.samples if s.reward is not None]
    rewards = [s.reward for s in known]
    mean, sd = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(s, (s.reward - mean) / (sd + EPS)) for s in known]


def paper_credit(z, z_reference):
    """(weights, distance) of a response: Eq. 2, section 4.3 and Eq. 6."""
    p, q = z.detach().softmax(-1), z_reference.softmax(-1)
    distance = 1 - (p * q).sqrt().sum(-1)
    entropy = -(p * p.log()).sum(-1) / math.log(VOCAB)
    scores = distance * entropy**KAPPA
    return len(scores) * (scores / TAU).softmax(0), distance


def answer(loss, model, **more):
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
    return {"loss": float(loss.detach()), "grad_norm": norm, "grads": grads, **more}


@pytest.fixture(scope="module")
def paper(folder):
    return {case: paper_update(folder, **options) for case, options in CASES.items()}


def paper_update(folder, tied, timing, aggregation, cap):
    """Loss (Eq. 7), gradient and token weights of the whole batch."""
    kind = "tied" if tied else "untied"
    reference, old, current = (hf_model(folder / f"{kind}_{x}") for x in ("reference", "old", "current"))
    samples = [pair for group in scored_groups() for pair in paper_advantages(group)]
    num_tokens = sum(len(s.token_ids) for s, _ in samples)
    loss, credit, clipped, gaps, distances, importance = 0.0, {}, [], [], [], []
    spreads, of_old = [], {"hellinger": [], "entropy": []}
    for sample, advantage in samples:
        response = torch.tensor(sample.token_ids)[:, None]
        ids = sample.prompt.token_ids, sample.token_ids
        z = response_logits(current, *ids)
        with torch.no_grad():
            z_old, z_reference = response_logits(old, *ids), response_logits(reference, *ids)
        old_log_probs = z_old.log_softmax(-1).gather(1, response)[:, 0]
        rho = (z.log_softmax(-1).gather(1, response)[:, 0] - old_log_probs).exp()
        weights, distance = paper_credit(z_old if timing == "rollout" else z, z_reference)
        bounded = rho.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
        objective = torch.minimum(rho * advantage * weights, bounded * advantage * weights)
        clipped.append((objective != rho * advantage * weights).double())
        engine = torch.tensor(sample.log_probs, dtype=torch.float64)
        if cap:
            importance.append((old_log_probs.exp() / engine.exp()).clamp(max=cap))
            objective = objective * importance[-1]
        if aggregation == "sequence_mean":
            loss = loss - objective.mean() / len(samples)
        else:
            loss = loss - objective.sum() / num_tokens
        credit[sample.prompt.id, sample.index] = weights
        gaps.append((old_log_probs - engine).abs())
        distances.append(distance)
        spreads.append((weights.tolist(), advantage))
        of_old["hellinger"].append(1 - (z_old.softmax(-1) * z_reference.softmax(-1)).sqrt().sum(-1))
        of_old["entropy"].append(-(z_old.softmax(-1) * z_old.log_softmax(-1)).sum(-1))
    means = {
        "clip_fraction": torch.cat(clipped).mean(),
        "log_prob_gap": torch.cat(gaps).mean(),
        "hellinger": torch.cat(distances).mean(),
        "log_prob_gap_max": torch.cat(gaps).max(),
    }
    for what, found in of_old.items():
        means |= token_quantiles(what, torch.cat(found).numpy())
    if cap:
        means["tis_weight"] = torch.cat(importance).mean()
    means = {k: float(v) for k, v in means.items()}
    return answer(loss, current, credit=credit, means=means, spread=spread(spreads))


@pytest.fixture(scope="module")
def cross_entropy(folder):
    """Mean over all answer tokens."""
    model = hf_model(folder / "tied_reference")
    total, count = 0.0, 0
    for prompt, answer_ids in sequences():
        z = model(torch.tensor([[*prompt, *answer_ids][:-1]])).logits[0][len(prompt) - 1 :]
        total = total - z.double().log_softmax(-1).gather(1, torch.tensor(answer_ids)[:, None]).sum()
        count += len(answer_ids)
    return answer(total / count, model)


# --- comparisons --------------------------------------------------------------------------------------


def gradients(before, after):
    """From LINEAR's step: u = g / (|g| + 1), so g = u / (1 - |u|)."""
    moved = {name: before[name].double() - after[name].double() for name in after}
    return {name: u / (1 - u.abs()) for name, u in moved.items()}


def check_gradients(got, want, before):
    """Element by element. The weight after the step is rounded to half a unit in the last place of the
    sum, at most 2^-24 |weight| (doubled for the step's own rounding, and by 1 / (1 - |u|)^2 for its
    inverse); the gradient itself is a float32 sum whose error is bounded by its largest terms, and is
    allowed the relative 1e-5 of the tensor's largest gradient that the norm is allowed."""
    assert set(got) == set(want)
    for name, g in want.items():
        rounding = 2.0**-23 * (before[name].abs().double() + g.abs()) * (1 + g.abs().double()) ** 2
        slack = rounding + 1e-5 * float(g.abs().max())
        worst = float(((got[name] - g.double()).abs() / slack).max())
        assert worst <= 1, f"{name}: {worst:.2f} times the bound"


@pytest.mark.parametrize("case", CASES)
def test_the_case_is_not_a_special_one(paper, case):
    p = paper[case]
    assert 0.1 < p["means"]["clip_fraction"] < 0.6
    weights = torch.cat(list(p["credit"].values()))
    assert weights.min() < 0.7 and weights.max() > 1.5
    assert abs(p["loss"]) > 0.01 and p["grad_norm"] > 0.1
    assert all(float(g.abs().max()) > 1e-4 for g in p["grads"].values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_update_is_that_of_the_paper(results, paper, folder, name, case):
    want = paper[case]
    kind = "tied" if CASES[case]["tied"] else "untied"
    before = hf_tensors(folder / f"{kind}_current")
    for result in results[name, case]:
        metrics = result["metrics"]
        assert metrics["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
        for key, value in want["means"].items():
            # The distance of float32 logits is off by the square root's slope at most; means of size 0.01.
            assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
        for key, value in want["spread"].items():
            # ln w moves by ds / tau, as in the test of the credit below.
            assert metrics[key] == pytest.approx(value, rel=1e-4), key
        check_gradients(gradients(before, result["weights"]), want["grads"], before)
    if "micro-batches" in name or name == "DP=2":
        assert all(r["microbatches"] > 1 for r in results[name, case])
    assert any(r["shared"] for r in results[name, case]), "no prompt is shared"


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c]["timing"] == "rollout"])
@pytest.mark.parametrize("name", NAMES)
def test_credit_is_that_of_the_paper(results, paper, name, case):
    want = paper[case]["credit"]
    found = {}
    for result in results[name, case]:
        found |= result["credit"]
    assert set(found) == set(want)
    for key, weights in want.items():
        # ln w moves by ds / tau; ds is some units in the last place of logits of size 10.
        assert torch.allclose(found[key].double(), weights, rtol=1e-4, atol=0), key


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES[1:])
def test_splits_agree_with_each_other(results, folder, name, case):
    """Against TP=1 with one micro-batch: tighter than two differences from the paper would give."""
    kind = "tied" if CASES[case]["tied"] else "untied"
    before = hf_tensors(folder / f"{kind}_current")
    (one,) = results["TP=1", case]
    want = gradients(before, one["weights"])
    found = {}
    for result in results[name, case]:
        for key in ("loss", "grad_norm", "ratio_mean", "entropy"):
            assert result["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-5), key
        assert result["metrics"]["clip_fraction"] == one["metrics"]["clip_fraction"]
        check_gradients(gradients(before, result["weights"]), want, before)
        found |= result["credit"]
    assert set(found) == set(one["credit"])
    assert all(torch.allclose(found[k], w, rtol=1e-5, atol=0) for k, w in one["credit"].items())


@pytest.mark.parametrize("name", NAMES)
def test_imbalance_is_of_the_replicas(results, name):
    replicas = [r["positions"] for r in results[name, "untied"]] if name == "DP=2" else [1]
    want = max(replicas) / (sum(replicas) / len(replicas)) - 1
    assert (want > 0.01) is (name == "DP=2")
    for result in results[name, "untied"]:
        assert result["metrics"]["packing_imbalance"] == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", NAMES[1:])
def test_other_algorithms_agree_at_every_split(results, folder, name, other):
    before = hf_tensors(folder / "untied_current")
    (one,) = results["TP=1", other]
    want, found = gradients(before, one["weights"]), {}
    keys = {"loss", "grad_norm", "ratio_mean"}
    keys |= {k for k in one["metrics"] if k.startswith(("credit_", "sequence_masked"))}
    for result in results[name, other]:
        for key in keys:
            assert result["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-5), key
        check_gradients(gradients(before, result["weights"]), want, before)
        found |= result["credit"]
    assert set(found) == set(one["credit"])
    assert all(torch.allclose(found[k], w, rtol=1e-5, atol=0) for k, w in one["credit"].items())
    if other == "auto":
        assert one["metrics"]["credit_effective_fraction"] == pytest.approx(0.6, abs=1e-6)
    if other == "reinforce":
        assert 0 < one["metrics"]["sequence_masked"] < 1


@pytest.mark.parametrize("name", NAMES)
def test_supervised_update(results, cross_entropy, folder, name):
    before = hf_tensors(folder / "tied_reference")
    for result in results[name, "sft"]:
        assert result["metrics"]["loss"] == pytest.approx(cross_entropy["loss"], rel=1e-5)
        assert result["metrics"]["grad_norm"] == pytest.approx(cross_entropy["grad_norm"], rel=1e-5)
        check_gradients(gradients(before, result["weights"]), cross_entropy["grads"], before)


@pytest.mark.parametrize("name", NAMES)
def test_first_dgpo_update_is_grpo(results, name):
    """With policy = reference every distance is exactly 0 and every weight exactly 1."""
    for ours, theirs in zip(results[name, "dgpo"], results[name, "grpo"], strict=True):
        (first, weights, credit), (later, _, later_credit) = ours
        (grpo_first, grpo_weights, _), (grpo_later, _, _) = theirs
        assert all(torch.equal(w, torch.ones_like(w)) for w in credit.values())
        assert first["hellinger"] == 0.0
        assert (first["loss"], first["grad_norm"]) == (grpo_first["loss"], grpo_first["grad_norm"])
        assert all(torch.equal(weights[n], grpo_weights[n]) for n in grpo_weights)
        # The second update is another one: the first was not equal for want of any effect.
        assert later["grad_norm"] != pytest.approx(grpo_later["grad_norm"], rel=1e-3)
        assert not later_credit or any(float((w - 1).abs().max()) > 0.1 for w in later_credit.values())


@pytest.mark.parametrize("name", WITHOUT_A_PASS)
def test_an_only_update_needs_no_pass_before_it(results, name):
    """Its own log-probs are the old ones: bit for bit the metrics and weights of a run that takes both."""
    for with_pass, without in zip(results[name, False], results[name, True], strict=True):
        for (metrics, weights, _), (only, after, _) in zip(with_pass, without, strict=True):
            assert only == metrics and only["ratio_mean"] == 1
            assert {"log_prob_gap", "entropy_p50", "tis_weight", "sequence_masked"} <= set(only)
            assert 0 < only["tis_capped"] < 1 and 0 < only["sequence_masked"] < 1
            assert all(torch.equal(after[tensor], value) for tensor, value in weights.items())
