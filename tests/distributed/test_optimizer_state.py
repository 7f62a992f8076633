"""The optimizer in checkpoints of several data-parallel ranks: who holds, sends and writes what.
Megatron's own save of the same format is read too."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from patience import patience
from spawn import run_ranks
from tiny import config, sequences, split, write_model

from megatron_dgpo.config import OptimizerConfig

OPTIMIZER = OptimizerConfig(lr=1e-2, clip_grad=0.5, adam_eps=1e-3)
"""With this eps a difference of d between two gradients moves a weight by at most 10 d."""
LIMIT = patience() + 77
"""Seconds of a save, which no other wait has."""
SPLITS = {"DP=4": 1, "TP=2 DP=2": 2}
"""Name -> tensor-parallel size, of four ranks."""
AVERAGES = ("exp_avg", "exp_avg_sq")


def train(policy, updates):
    """(loss, gradient norm) of each of further updates on one batch."""
    from megatron_dgpo.coldstart import global_sum
    from megatron_dgpo.data.packing import PackItem, pack
    from megatron_dgpo.learner import supervised_loss

    batches = pack([PackItem(*pair) for pair in sequences()], max_tokens=60, min_batches=4)
    for batch in batches:
        batch.coefficients_T = batch.loss_mask_T.float() / 50
    dp, rows = policy.groups.dp, []
    for _ in range(updates):
        result = policy.update(batches[dp.rank() :: dp.size()], supervised_loss(policy))
        rows.append((global_sum(sum(map(float, result.metrics)), policy.groups), result.grad_norm))
    return rows


def went_on(policy):
    from megatron_dgpo.weights.export import export_stream

    def weights():
        return {name: tensor.clone() for name, tensor in export_stream(policy.model, policy.groups)}

    return weights(), train(policy, 2), weights()


def megatrons_own(policy, *, loading):
    """What Megatron itself saves in this format, gathered on every rank."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_dgpo.mcore.files import METADATA

    model = policy.ddp.module.sharded_state_dict(metadata=dict(METADATA))
    optimizer = policy.optimizer.sharded_state_dict(model, is_loading=loading, metadata=dict(METADATA))
    rank, ranks = policy.groups.rank, policy.groups.world_size
    rest = {"scheduler": policy.scheduler.state_dict(), "rng": ShardedObject("rng", None, (ranks,), (rank,))}
    return {"model": model, "optimizer": optimizer, **rest}


def what_travels(policy):
    """Of a save: numbers of the rank's optimizer, that it writes, that it copies, that it sends; the largest
    parameter; and whether what is not cut is written from where it is."""
    from megatron_dgpo.mcore import optimizer_state
    from megatron_dgpo.mcore.files import METADATA
    from megatron_dgpo.mcore.policy import the_optimizer

    optimizer, sent, send = the_optimizer(policy.optimizer), [], torch.distributed.send
    with mock.patch.object(
        torch.distributed, "send", lambda t, **k: (sent.append(t.numel()), send(t, **k))[1]
    ):
        model = policy.ddp.module.sharded_state_dict(metadata=dict(METADATA))
        state = optimizer_state.to_save(optimizer, model)
    asked = optimizer_state.to_load(optimizer, model)
    cuts = list(optimizer_state.cuts(optimizer))
    me = policy.groups.dp.rank()
    mine = [p.size for cut in cuts for p in cut.pieces if p.rank == me]
    written = [cuts[n].param.numel() for n in state]
    in_place = all(
        state[n]["exp_avg"].data.data_ptr()
        == optimizer._get_main_param_and_optimizer_states(cuts[n].param)["exp_avg"].data_ptr()
        for n in state
        if len(cuts[n].pieces) == 1
    )
    return {
        **{"held": sum(mine), "written": sum(written), "sent": sum(sent) / 3, "in place": in_place},
        "cut": sum(cuts[n].param.numel() for n in state if len(cuts[n].pieces) > 1),
        "asked for": sum(cuts[n].param.numel() for n in asked),
        "largest": max(cut.param.numel() for cut in cuts),
        "all": sum(cut.param.numel() for cut in cuts),
        "whole": all(
            sum(p.size for p in cut.pieces) == cut.param.numel() and cut.owner in {p.rank for p in cut.pieces}
            for cut in cuts
        ),
    }


def four_ranks(rank, world_size, folder):
    from megatron.core.dist_checkpointing import load_tensors_metadata

    from megatron_dgpo.mcore import checkpoint
    from megatron_dgpo.mcore.checkpoint import CheckpointStore, restore
    from megatron_dgpo.run import build_policy

    out = {}
    configs = {name: config(folder / "model", tp=tp, optimizer=OPTIMIZER) for name, tp in SPLITS.items()}
    for saved, c in configs.items():
        with split(c) as groups:
            policy = build_policy(c, groups, total_updates=8, keep_reference=False)
            train(policy, 2)
            out[saved, "travels"] = what_travels(policy)
            store, megatrons = (
                CheckpointStore(folder / f"{saved}{kind}", groups, timeout_seconds=LIMIT)
                for kind in ("", "own")
            )
            with mock.patch("faulthandler.dump_traceback_later") as limit:
                store.save(policy, {"step": 2, "world_size": world_size})
            out[saved, "limits"] = [call.args for call in limit.call_args_list]
            with mock.patch.object(checkpoint, "_sharded_state", megatrons_own):
                megatrons.save(policy, {"step": 2, "world_size": 1})
            files = {s: load_tensors_metadata(str(s.latest().path)) for s in (store, megatrons)}
            shapes = [{k: tuple(t.global_shape) for k, t in found.items()} for found in files.values()]
            out[saved, "shapes"] = shapes
            sizes = {p.name: p.stat().st_size for p in store.latest().path.glob("__*")}
            out[saved, "sizes"] = [
                sum(n for name, n in sizes.items() if name.startswith(f"__{r}_")) for r in range(world_size)
            ]
            out[saved, "want"] = went_on(policy)
    for name, c in configs.items():
        with split(c) as groups:
            for saved in SPLITS:
                for kind in ("", "own"):
                    policy = build_policy(c, groups, total_updates=8, keep_reference=False)
                    restore(policy, CheckpointStore(folder / f"{saved}{kind}", groups).latest())
                    out[saved, kind, name] = went_on(policy)
    return out


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizer")
    write_model(folder / "model", tied=False, num_hidden_layers=2)
    return run_ranks(four_ranks, 4, folder)


@pytest.mark.parametrize("saved", SPLITS)
def test_a_rank_writes_its_share_and_sends_only_what_is_cut(ranks, saved):
    replicas = 4 // SPLITS[saved]
    travels = [rank[saved, "travels"] for rank in ranks]
    for one in travels:
        assert one["whole"] and one["in place"]
        assert one["written"] <= one["all"] / replicas + one["largest"]
        assert one["asked for"] <= one["all"] / replicas + 2 * one["largest"]
        # Beside what the optimizer holds anyway, a rank has the tensors in memory that are cut.
        assert one["cut"] <= 2 * one["largest"] < one["all"] / 2
        assert one["sent"] <= one["largest"]
    if saved == "DP=4":
        assert sum(one["sent"] for one in travels) > 0, "no cut: nothing is tested"
    assert sum(one["written"] for one in travels) == sum(t["all"] for t in travels) / replicas
    sizes = ranks[0][saved, "sizes"]
    assert min(sizes) > sum(sizes) / 8, "every rank writes"


def test_a_save_has_the_limit_of_the_setting(ranks):
    for rank in ranks:
        assert rank["DP=4", "limits"] == [(LIMIT,)]


@pytest.mark.parametrize("saved", SPLITS)
def test_the_files_are_those_of_megatrons_own_save(ranks, saved):
    for rank in ranks:
        ours, megatrons = rank[saved, "shapes"]
        assert ours == megatrons
        weights = {name for name in ours if not name.startswith("optimizer.")}
        states = {f"optimizer.state.{key}.{name}" for name in weights for key in ("param", *AVERAGES)}
        assert len(weights) == 10 and set(ours) == weights | states


@pytest.mark.parametrize("kind", ["", "own"])
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("saved", SPLITS)
def test_a_run_goes_on_at_any_split_from_either(ranks, saved, kind, name):
    """From Megatron's own save, as earlier releases of this project wrote it, too."""
    for rank in ranks:
        (at, rows, after), (want_at, want_rows, want_after) = rank[saved, kind, name], rank[saved, "want"]
        assert all(torch.equal(at[n], want_at[n]) for n in want_at) and set(at) == set(want_at)
        apart = max(float((after[n] - want_after[n]).abs().max()) for n in want_after)
        if name == saved:
            assert rows == want_rows and apart == 0
        for row, want in zip(rows, want_rows, strict=True):
            assert row == pytest.approx(want, rel=1e-6)
        assert apart < 1e-6
