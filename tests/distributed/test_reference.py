"""The reference: a copy of the start weights in host memory that borrows the policy's buffers for its pass,
and a cache of its hidden states for as long as the algorithm needs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spawn import run_ranks
from tiny import SPLITS, config, scored_groups, split, write_model

from megatron_dgpo.config import OptimizerConfig
from megatron_dgpo.config.algorithms import DGPOConfig, GRPOConfig

ALGORITHMS = {
    "rollout": DGPOConfig(credit_timing="rollout"),
    "update": DGPOConfig(credit_timing="update"),
    "kl": GRPOConfig(kl_coef=0.1),
    "grpo": GRPOConfig(),
}
CASES = [("TP=2", "float32"), ("TP=2 SP", "bfloat16"), ("PP=2", "float32"), ("PP=2", "bfloat16")]


def parameters(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def learner_of(policy, algorithm):
    from megatron_dgpo.algorithms import build_algorithm
    from megatron_dgpo.learner import Learner

    built = build_algorithm(algorithm, vocab_size=policy.shape.vocab_size)
    return Learner(policy, built, temperature=1.0, max_tokens=60)


def packed(learner):
    groups = scored_groups()
    learner.algorithm.assign_advantages(groups)
    return learner.pack([learner.algorithm.select(groups)])


def cached(minibatches):
    """Dtype and device type of each micro-batch's cached hidden states, where it has them."""
    batches = [b for m in minibatches for b in m.batches]
    tensors = [b.features["reference_hidden"] for b in batches if "reference_hidden" in b.features]
    return len(batches), [(x.dtype, x.device.type) for x in tensors]


def work_at(folder, name, dtype):
    from megatron_dgpo.run import build_policy

    c = config(folder / dtype, dtype=dtype, optimizer=OptimizerConfig(lr=1e-2), **SPLITS[name])
    with split(c) as groups:
        policy = build_policy(c, groups, total_updates=4, keep_reference=True)
        start = parameters(policy)
        learner = learner_of(policy, ALGORITHMS["rollout"])
        (minibatch,) = packed(learner)
        learner.prepare([minibatch])
        learner.update(minibatch, save_bad_batch_to=folder)
        before = parameters(policy)
        with policy.reference_weights():
            inside = parameters(policy)
        out = {"moved": not same(start, before), "lent": same(inside, start)}
        out["given back"] = same(parameters(policy), before)
        try:
            with policy.reference_weights():
                raise KeyError("in the middle of the pass")
        except KeyError:
            out["given back after an error"] = same(parameters(policy), before)
        for kind, algorithm in ALGORITHMS.items():
            learner = learner_of(policy, algorithm)
            minibatches = packed(learner)
            learner.prepare(minibatches)
            out[kind] = cached(minibatches)
        out["given back after the passes"] = same(parameters(policy), before)
        out["last stage"] = groups.is_last_stage
        return out


def work(rank, world_size, folder):
    return {case: work_at(folder, *case) for case in CASES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = Path(tmp_path_factory.mktemp("reference"))
    for dtype in ("float32", "bfloat16"):
        write_model(folder / dtype, tied=True, dtype=getattr(torch, dtype))
    return run_ranks(work, 2, folder)


@pytest.mark.parametrize("case", CASES)
def test_the_policys_weights_come_back_bit_for_bit(ranks, case):
    for rank in ranks:
        assert rank[case]["moved"], "the policy is still the reference: nothing is shown"
        for what in ("lent", "given back", "given back after an error", "given back after the passes"):
            assert rank[case][what], what


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_are_cached_for_credit_at_update_alone(ranks, case):
    for rank in ranks:
        found = rank[case]
        for kind in ("rollout", "kl", "grpo"):
            assert found[kind][1] == []
        batches, tensors = found["update"]
        assert batches > 1
        # In host memory and in the model's precision, on the stage that has the loss.
        wanted = [(getattr(torch, case[1]), "cpu")] * batches if found["last stage"] else []
        assert tensors == wanted
