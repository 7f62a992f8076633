"""The peak memory of a whole step, through Megatron and its optimizer, is that of a chunk of logits,
whatever the vocabulary: measured, from the allocator's record of every allocation and release."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from memory import measured
from spawn import run_ranks
from tiny import config, split, write_model

from megatron_dgpo.config.algorithms import DGPOConfig
from megatron_dgpo.types import Group, Prompt, Sample

CASES = [(16384, False), (65536, False), (65536, True)]
"""Vocabulary, and whether embedding and LM head are one."""
BUDGET = 32 << 20
"""Bytes of a chunk's float32 logits."""
EAGER_FORWARD = 4
"""Tensors of that size (see tests/unit/test_ops_memory.py)."""
PROMPT, RESPONSE, SEQUENCES = 28, 100, 9
TOKENS = (PROMPT + RESPONSE - 1) * SEQUENCES
"""1143, in one micro-batch: logits of all of them are 75 MB with 16384 columns, 300 MB with 65536."""
ACTIVATIONS = 4 * TOKENS * 1024
"""Bytes of the rest of a model of one layer and hidden size 16: some 60 numbers of hidden size a token."""

WIDE = 256
"""Hidden size whose hidden states are much more than the features of a token."""


def samples(vocab):
    g = random.Random(1)
    prompts = [Prompt(f"p{i}", tuple(g.randrange(vocab) for _ in range(PROMPT)), "", "") for i in range(3)]
    groups = []
    for prompt in prompts:
        ids = [[g.randrange(vocab) for _ in range(RESPONSE)] for _ in range(SEQUENCES // len(prompts))]
        rows = [Sample(prompt, i, x, [-9.0] * RESPONSE, "stop", (), reward=i % 2) for i, x in enumerate(ids)]
        groups.append(Group(prompt, rows))
    return groups


def step(folder, vocab, tied):
    """Memory of preparing a rollout batch, and of the update on it."""
    from megatron_dgpo.algorithms import build_algorithm
    from megatron_dgpo.learner import Learner
    from megatron_dgpo.run import build_policy

    sizes = {"vocab_size": vocab, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 16, "max_position_embeddings": 256}
    model = write_model(folder / f"{vocab}{tied}", tied=tied, **sizes)
    # Credit from the present policy: the update, too, has both distributions' logits.
    c = config(model, algorithm=DGPOConfig(credit_timing="update"), temperature=0.9)
    with split(c) as groups:
        algorithm = build_algorithm(c.algorithm, vocab_size=vocab)
        policy = build_policy(c, groups, total_updates=1, keep_reference=True)
        budget = c.train.max_tokens_per_microbatch
        learner = Learner(policy, algorithm, temperature=0.9, max_tokens=budget, share_prompts=False)
        everything = samples(vocab)
        algorithm.assign_advantages(everything)
        (minibatch,) = learner.pack([algorithm.select(everything)])
        assert [batch.num_tokens for batch in minibatch.batches] == [TOKENS]
        _, prepare = measured(lambda: learner.prepare([minibatch]))
        sums, update = measured(lambda: learner.update(minibatch, save_bad_batch_to=folder))
        return {"prepare": prepare, "update": update}


def rollouts(folder):
    """Memory of preparing one, and four times as many micro-batches with credit at rollout."""
    from megatron_dgpo.algorithms import build_algorithm
    from megatron_dgpo.learner import Learner
    from megatron_dgpo.run import build_policy

    sizes = {"vocab_size": 64, "hidden_size": WIDE, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 16, "max_position_embeddings": 256}
    c = config(write_model(folder / "wide", tied=True, **sizes), algorithm=DGPOConfig())
    with split(c) as groups:
        algorithm = build_algorithm(c.algorithm, vocab_size=64)
        policy = build_policy(c, groups, total_updates=1, keep_reference=True)
        learner = Learner(policy, algorithm, temperature=1.0, max_tokens=TOKENS, share_prompts=False)
        everything = samples(64)
        algorithm.assign_advantages(everything)
        minibatches = {n: learner.pack([algorithm.select(everything)] * n) for n in (1, 4)}
        return {n: measured(lambda m=m: learner.prepare(m))[1] for n, m in minibatches.items()}


def work(rank, world_size, folder):
    return {case: step(folder, *case) for case in CASES} | {"rollouts": rollouts(folder)}


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    (result,) = run_ranks(work, 1, Path(tmp_path_factory.mktemp("memory")))
    return result


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("part", ["prepare", "update"])
def test_peak_is_one_chunks_whatever_the_vocabulary(memory, case, part):
    found = memory[case][part]
    # Beyond what lives between steps: parameters, reference, optimizer state, gradient buffer.
    assert 2 * BUDGET <= found.peak <= EAGER_FORWARD * BUDGET + ACTIVATIONS
    # No tensor of all tokens and all columns exists: the largest is a chunk, but for its alignment.
    assert 0.9 * BUDGET <= found.largest <= BUDGET + 64 < 4 * TOKENS * case[0]
    assert found.kept <= ACTIVATIONS
    # Four times the columns, and no more but a few numbers a token.
    assert found.peak <= memory[CASES[0]][part].peak + 4 * TOKENS * 64


def test_preparing_takes_as_much_whatever_the_number_of_micro_batches(memory):
    one, four = memory["rollouts"][1], memory["rollouts"][4]
    hidden = 4 * TOKENS * WIDE
    assert one.peak > 2 * hidden  # it has the policy's and the reference's
    # What is kept of each of the other three are numbers a token, in float32, and not their hidden states.
    assert four.peak <= one.peak + 3 * TOKENS * 4 * 16 < one.peak + 3 * hidden / 8
