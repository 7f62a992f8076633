"""The value model at every split: values, advantages and steps of it, against transformers and torch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from spawn import run_ranks
from tiny import SPLITS, config, hf_model, scored_groups, split, write_model

from megatron_dgpo.config import OptimizerConfig
from megatron_dgpo.config.algorithms import PPOConfig

GAMMA, LAM, CLIP = 0.9, 0.8, 0.3
PPO = PPOConfig(gamma=GAMMA, lam=LAM, value_clip=CLIP, critic_lr=0.05)
STEP = OptimizerConfig(lr=0.05, adam_eps=1.0, weight_decay=0.0, clip_grad=0.0)
WORLDS = {
    1: {"TP=1": ({}, 4096), "TP=1, micro-batches": ({}, 30)},
    2: {name: (SPLITS[name], 30) for name in ("DP=2", "TP=2", "TP=2 SP", "PP=2")},
    4: {"TP=2 PP=2 SP": ({"tp": 2, "pp": 2, "sp": True}, 30)},
}
NAMES = [name for splits in WORLDS.values() for name in splits]


def head(hidden_size: int) -> torch.Tensor:
    return torch.randn(1, hidden_size, generator=torch.Generator().manual_seed(5)) / 4


def critic_step(folder: Path, kwargs, max_tokens):
    """Metrics of two updates on one rollout batch, and (prompt, sample) -> values before and after them and
    advantages, where they are."""
    from megatron_dgpo.algorithms import build_algorithm
    from megatron_dgpo.data.packing import unpack
    from megatron_dgpo.learner import Learner
    from megatron_dgpo.mcore.policy import NonFiniteUpdate
    from megatron_dgpo.run import build_critic, build_policy, merge_over_ranks

    c = config(folder, max_tokens=max_tokens, optimizer=STEP, algorithm=PPO, **kwargs)
    with split(c) as groups:
        algorithm = build_algorithm(PPO, vocab_size=38)
        policy = build_policy(c, groups, total_updates=4, keep_reference=False)
        learner = Learner(policy, algorithm, temperature=1.0, max_tokens=max_tokens)
        critic = build_critic(c, groups, total_updates=4)
        if groups.is_last_stage:
            weight = critic.policy.model.head_weight
            assert not weight.any()
            with torch.no_grad():
                weight.copy_(head(weight.shape[1]))
            critic.policy.optimizer.reload_model_params()
        else:
            critic.policy.optimizer.reload_model_params()
        mine = scored_groups()[groups.dp.rank() :: groups.dp.size()]
        algorithm.assign_advantages(mine)
        (minibatch,) = learner.pack([algorithm.select(mine)])
        sums = critic.prepare([minibatch])
        kept = [dict(b.features) for b in minibatch.batches]
        out = []
        for _ in range(2):
            sums.merge(critic.update(minibatch, save_bad_batch_to=folder))
            out.append(merge_over_ranks(sums, groups))
            sums = type(sums)()
        critic.prepare([minibatch])
        rows = {}
        if groups.is_last_stage:
            for name, values in (
                ("values", [f["values"] for f in kept]),
                ("advantages", [f["advantages"] for f in kept]),
                ("after", [b.features["values"] for b in minibatch.batches]),
            ):
                found = unpack(minibatch.batches, values, len(minibatch.samples))
                for s, row in zip(minibatch.samples, found, strict=True):
                    rows.setdefault((s.prompt.id, s.index), {})[name] = row.clone()
        for batch in minibatch.batches if groups.is_last_stage else []:
            batch.features["returns"].fill_(math.nan)
        (bad := folder / f"world{groups.world_size}").mkdir(exist_ok=True)
        with pytest.raises(NonFiniteUpdate, match="the mini-batch is in ") as caught:
            critic.update(minibatch, save_bad_batch_to=bad)
        saved = torch.load(str(caught.value).rpartition(" is in ")[2], weights_only=False)
        assert saved.num_tokens == minibatch.num_tokens
        return {"metrics": out, "rows": rows}


def work(rank, world_size, folder):
    return {name: critic_step(folder, *how) for name, how in WORLDS[world_size].items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("critic") / "model", tied=True)


@pytest.fixture(scope="module")
def results(folder):
    ranks = [run_ranks(work, world, folder) for world in WORLDS]
    return {name: [rank[name] for rank in world] for world in ranks for name in world[0]}


@pytest.fixture(scope="module")
def plain(folder):
    """The same in torch: transformers' trunk, one linear head, Adam."""
    model = hf_model(folder)
    weight = head(model.config.hidden_size).requires_grad_()
    trunk = list(model.model.parameters())
    adam = torch.optim.Adam([*trunk, weight], lr=0.05, betas=(STEP.adam_beta1, STEP.adam_beta2), eps=1.0)
    samples = [s for g in scored_groups() for s in g.samples if s.reward is not None]

    def values(s):
        ids = torch.tensor([[*s.prompt.token_ids, *s.token_ids][:-1]])
        hidden = model.model(ids).last_hidden_state[0, len(s.prompt.token_ids) - 1 :]
        return hidden @ weight[0]

    with torch.no_grad():
        old = [values(s) for s in samples]
    advantages, returns = [], []
    for s, v in zip(samples, old, strict=True):
        later, row = 0.0, []
        for t in reversed(range(len(v))):
            last = t == len(v) - 1
            delta = (s.reward if last else 0.0) + (0.0 if last else GAMMA * float(v[t + 1])) - float(v[t])
            later = delta + GAMMA * LAM * later
            row.insert(0, later)
        advantages.append(torch.tensor(row, dtype=torch.float64))
        returns.append(advantages[-1] + v.double())
    every, targets = torch.cat(advantages), torch.cat(returns)
    explained = 1 - (targets - torch.cat(old)).var(correction=0) / targets.var(correction=0)
    metrics = []
    for _ in range(2):
        adam.zero_grad()
        error = torch.tensor(0.0)
        for s, v, r in zip(samples, old, returns, strict=True):
            new = values(s)
            near = v + (new - v).clamp(-CLIP, CLIP)
            error = error + torch.maximum((new - r.float()) ** 2, (near - r.float()) ** 2).sum() / 2
        loss = error / len(every)
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in [*trunk, weight]))
        metrics.append({"value_loss": float(loss), "value_grad_norm": norm})
        adam.step()
    with torch.no_grad():
        after = [values(s) for s in samples]
    centred = [(a - every.mean()) / every.std(correction=0) for a in advantages]
    rows = {
        (s.prompt.id, s.index): {"values": o, "advantages": a, "after": n}
        for s, o, a, n in zip(samples, old, centred, after, strict=True)
    }
    metrics[0]["explained_variance"] = float(explained)
    return {"metrics": metrics, "rows": rows}


@pytest.mark.parametrize("name", NAMES)
def test_the_critic_is_that_of_plain_torch(results, plain, name):
    found = {}
    for result in results[name]:
        for got, want in zip(result["metrics"], plain["metrics"], strict=True):
            for key, value in want.items():
                assert got[key] == pytest.approx(value, rel=2e-5), key
        found |= result["rows"]
    assert set(found) == set(plain["rows"])
    moved = 0.0
    for key, want in plain["rows"].items():
        for what, row in want.items():
            # float32 through two layers, and through two steps of Adam.
            assert torch.allclose(found[key][what].double(), row.double(), rtol=1e-4, atol=2e-5), (key, what)
        moved = max(moved, float((want["after"] - want["values"]).abs().max()))
    assert moved > 0.1
