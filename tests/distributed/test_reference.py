"""The reference: a copy of the start weights that takes the policy's place for its pass, and its hidden
states, which are kept for as long as the algorithm needs them."""

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
CASES = [
    ("TP=2", "float32", "device"),
    ("TP=2 SP", "bfloat16", "host"),
    ("PP=2", "float32", "device"),
    ("PP=2", "bfloat16", "host"),
]


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
    """Each micro-batch's tokens, and dtype, device type and rows of its cached hidden states, if any."""
    batches = [b for m in minibatches for b in m.batches]
    tensors = [b.features["reference_hidden"] for b in batches if "reference_hidden" in b.features]
    return [b.num_tokens for b in batches], [(x.dtype, x.device.type, x.shape[0]) for x in tensors]


def by_hand(policy, batches):
    """Each micro-batch's numbers from a pass of the reference over all of them and then one of the policy."""
    from megatron_dgpo.learner import policy_stats

    with policy.reference.lent():
        waiting = iter(policy.forward(batches, lambda hidden, _, __: hidden.clone()))
    stats = policy.forward(
        batches, lambda h, w, b: policy_stats(policy, h, w, b, reference_hidden=next(waiting))
    )
    return [{"entropy": x.entropy, "hellinger": x.hellinger, "kl_reference": x.reverse_kl} for x in stats]


def matches_by_hand(policy):
    """How many micro-batches have, bit for bit, the numbers of two whole passes; on the last stage."""
    learner = learner_of(policy, ALGORITHMS["rollout"])
    minibatches = packed(learner)
    learner.prepare(minibatches)
    batches = [b for m in minibatches for b in m.batches]
    found = [same(wanted, b.features) for b, wanted in zip(batches, by_hand(policy, batches), strict=False)]
    moved = all(bool(b.features["hellinger"].gt(0).any()) for b in batches[: len(found)])
    return len(batches), found if moved else "the distance is 0 everywhere"


def work_at(folder, name, dtype, placement):
    from megatron_dgpo.run import build_policy

    optimizer = OptimizerConfig(lr=1e-2)
    c = config(folder / dtype, dtype=dtype, reference=placement, optimizer=optimizer, **SPLITS[name])
    with split(c) as groups:
        policy = build_policy(c, groups, total_updates=4, keep_reference=True)
        start = parameters(policy)
        learner = learner_of(policy, ALGORITHMS["rollout"])
        (minibatch,) = packed(learner)
        learner.prepare([minibatch])
        learner.update(minibatch, save_bad_batch_to=folder)
        before = parameters(policy)
        with policy.reference.lent():
            inside = parameters(policy)
        out = {"moved": not same(start, before), "lent": same(inside, start)}
        out["given back"] = same(parameters(policy), before)
        try:
            with policy.reference.lent():
                raise KeyError("in the middle of the pass")
        except KeyError:
            out["given back after an error"] = same(parameters(policy), before)
        for kind, algorithm in ALGORITHMS.items():
            learner = learner_of(policy, algorithm)
            minibatches = packed(learner)
            learner.prepare(minibatches)
            out[kind] = cached(minibatches)
        out["by hand"] = matches_by_hand(policy)
        out["given back after the passes"] = same(parameters(policy), before)
        out["last stage"] = groups.is_last_stage
        return out


def work(rank, world_size, folder):
    from megatron_dgpo.mcore import reference

    reference._WINDOW_BYTES = 2500  # of one or two micro-batches
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
        tokens, tensors = found["update"]
        assert len(tokens) > 1
        # In host memory, in the model's precision, on the stage that has the loss, a share on each TP rank.
        ranks = 2 if case[0].startswith("TP") else 1
        wanted = [(getattr(torch, case[1]), "cpu", -(-n // ranks)) for n in tokens]
        assert tensors == (wanted if found["last stage"] else [])


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_do_not_depend_on_how_the_passes_are_mixed(ranks, case):
    for rank in ranks:
        batches, same_bits = rank[case]["by hand"]
        assert batches > 2 and same_bits == ([True] * batches if rank[case]["last stage"] else [])
