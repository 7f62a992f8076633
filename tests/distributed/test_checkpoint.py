"""Checkpoints: exact continuation, other splits, what is kept, and what is never loaded."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from lazy_adam import in_megatron
from spawn import run_ranks
from tiny import SPLITS, config, sequences, split, write_model

from megatron_dgpo.config import OptimizerConfig

OPTIMIZER = OptimizerConfig(
    lr=1e-2, min_lr=1e-4, warmup_steps=4, decay_style="cosine", clip_grad=0.5, adam_eps=1e-3
)
"""The checkpoint comes in the middle of the warm-up. With this eps a difference of d between two gradients
moves a weight by at most lr d / eps = 10 d, so that resharded runs can be compared (d is about 1e-8)."""
SAVED = {  # name -> split, tied, dtype
    "TP=2": ("TP=2", False, "float32"),
    "PP=2 tied": ("PP=2", True, "float32"),
    "TP=2 SP tied bf16": ("TP=2 SP", True, "bfloat16"),
}
RESHARDED = [
    ("TP=2", "PP=2"),
    ("TP=2", "DP=2"),
    ("TP=2", "TP=1"),
    ("PP=2 tied", "TP=2"),
    ("PP=2 tied", "TP=1"),
]
BEFORE, AFTER = 3, 3
"""Updates before and after the checkpoint."""
RATES = (0.25e-2, 0.5e-2, 0.75e-2, 1e-2, 1e-2, 1e-4 + 0.99e-2 * (1 + math.cos(math.pi / 4)) / 2)
"""Of these updates; the decay goes over the 4 after the warm-up."""


def build(folder, name, tied, dtype):
    from megatron_dgpo.run import build_policy

    c = config(folder / f"tied{tied}", dtype=dtype, optimizer=OPTIMIZER, **SPLITS.get(name, {}))
    return c, lambda groups: build_policy(c, groups, total_updates=8, keep_reference=True)


def train(policy, updates):
    """[(loss, gradient norm, learning rate)] of further updates on one batch."""
    from megatron_dgpo.coldstart import global_sum
    from megatron_dgpo.data.packing import PackItem, pack
    from megatron_dgpo.learner import supervised_loss

    batches = pack([PackItem(*pair) for pair in sequences()], max_tokens=60, min_batches=2)
    for batch in batches:
        batch.coefficients_T = batch.loss_mask_T.float() / 50
    dp = policy.groups.dp
    rows = []
    for _ in range(updates):
        result = policy.update(batches[dp.rank() :: dp.size()], supervised_loss(policy))
        loss = global_sum(sum(float(x) for x in result.metrics), policy.groups)
        rows.append((loss, result.grad_norm, result.learning_rate))
    return rows


def exported(policy):
    from megatron_dgpo.weights.export import export_stream

    return {name: tensor.clone() for name, tensor in export_stream(policy.model, policy.groups)}


def continued(policy):
    return {"at": exported(policy), "rows": train(policy, AFTER), "after": exported(policy)}


def save_and_restore(folder, saved):
    """A run that goes on, and one that starts from its checkpoint at the same split."""
    from megatron_dgpo.mcore.checkpoint import CheckpointStore, restore
    from megatron_dgpo.weights.convert import load_hf

    name, tied, dtype = SAVED[saved]
    c, make = build(folder, name, tied, dtype)
    with split(c) as groups:
        policy = make(groups)
        start = exported(policy)
        store = CheckpointStore(folder / saved, groups)
        first = train(policy, BEFORE)
        store.save(policy, {"step": BEFORE, "world_size": groups.world_size})
        out = {"first": first, "went on": continued(policy)}
        resumed = make(groups)
        restore(resumed, store.latest())
        with resumed.reference.lent():
            now = exported(resumed)
        out["reference kept"] = all(torch.equal(now[n], start[n]) for n in start)
        out["restored"] = continued(resumed)
        if dtype == "float32":  # the weights alone, to show that the rest matters
            bare = make(groups)
            weights = out["went on"]["at"]
            load_hf(bare.model, groups, list(weights), weights.__getitem__)
            out["bare"] = continued(bare)
    return out


def load_elsewhere(folder, saved, name):
    from megatron_dgpo.mcore.checkpoint import CheckpointStore, restore

    _, tied, dtype = SAVED[saved]
    c, make = build(folder, name, tied, dtype)
    with split(c) as groups:
        policy = make(groups)
        restore(policy, CheckpointStore(folder / saved, groups).latest())
        return continued(policy)


def two_ranks(rank, world_size, folder):
    results = {saved: save_and_restore(folder, saved) for saved in SAVED}
    for saved, name in RESHARDED:
        if name != "TP=1":
            results[saved, name] = load_elsewhere(folder, saved, name)
    return results


def parent_death_signal(new=None):
    """The signal that this process gets when its parent ends, after it has been set to `new`."""
    PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
    prctl = ctypes.CDLL(None).prctl
    if new is not None:
        prctl(PR_SET_PDEATHSIG, int(new))
    found = ctypes.c_int()
    prctl(PR_GET_PDEATHSIG, ctypes.byref(found))
    return found.value


def one_rank(rank, world_size, folder):
    if sys.platform == "linux":
        parent_death_signal(signal.SIGTERM)  # as a rank of torchrun has it
    results = {pair: load_elsewhere(folder, *pair) for pair in RESHARDED if pair[1] == "TP=1"}
    c, make = build(folder, "TP=1", True, "float32")
    with split(c) as groups:
        policy = make(groups)
        results["kept"] = what_is_kept(folder / "kept", policy, groups)
        results["another model"] = another_model(folder / "another", policy, groups)
        results["damaged"] = {how: damaged(folder / how, policy, groups, how) for how in DAMAGE}
        results["lazy"] = lazy_optimizers(folder / "lazy", make, groups)
        results["more state"] = layers_with_more_state(folder / "more", make, groups)
    if sys.platform == "linux":
        results["signal"] = parent_death_signal()
    return results


def lazy_optimizers(folder, make, groups):
    """Runs whose optimizer makes its state late, runs of torch's from their checkpoints, and the reverse."""
    from megatron_dgpo.mcore.checkpoint import CheckpointStore, restore

    def saved(name, updates):
        policy = make(groups)
        train(policy, updates)
        store = CheckpointStore(folder / name, groups)
        store.save(policy, {"step": 1, "world_size": 1})
        return continued(policy)

    def restored(name):
        policy = make(groups)
        restore(policy, CheckpointStore(folder / name, groups).latest())
        return continued(policy)

    out = {}
    with in_megatron():
        want = saved("lazy", 0)
        out["lazy"] = restored("lazy"), want
    out["lazy, torch"] = restored("lazy"), want
    want = saved("torch", BEFORE)
    with in_megatron():
        out["torch, lazy"] = restored("torch"), want
    return out


def layers_with_more_state(folder, make, groups):
    """Transformer Engine's attention and norms have extra states, which the torch layer spec's have not."""
    from megatron_dgpo.mcore import layers
    from megatron_dgpo.mcore.checkpoint import CheckpointStore, load_weights, restore

    policy = make(groups)
    train(policy, 1)
    store = CheckpointStore(folder, groups)
    store.save(policy, {"step": 1, "world_size": 1})
    out = {"want": exported(policy)}
    none = torch.empty(0, dtype=torch.uint8)
    more = dict(get_extra_state=lambda self: none, set_extra_state=lambda self, state: None)
    with (
        mock.patch.multiple(layers.PackedSDPA, create=True, **more),
        mock.patch.multiple(layers.RMSNorm, create=True, **more),
    ):
        other = make(groups)
        names = other.model.state_dict()
        out["asked for"] = [n for n in names if n.endswith("core_attention._extra_state")]
        restore(other, store.latest())
        out["restored"] = exported(other)
        other = make(groups)
        load_weights(other.model, groups, store.latest().path)
        out["imported"] = exported(other)
    return out


def what_is_kept(folder, policy, groups):
    from megatron_dgpo.mcore.checkpoint import CheckpointStore

    store = CheckpointStore(folder, groups, keep_last=2, keep_best=True)
    out = {"after save": []}
    for step, score in enumerate((0.1, 0.9, 0.2, None, 0.3), start=1):
        store.save(policy, {"step": step, "world_size": 1, "score": score})
        out["after save"].append([c.step for c in store.list()])
    out["best"] = store.best().step
    try:
        store.save(
            policy, {"step": 6, "world_size": 1, "score": object()}
        )  # no JSON: fails after the weights
    except TypeError:
        out["after failure"] = [c.step for c in store.list()]
    out["leftover"] = sorted(p.name for p in folder.iterdir() if p.name not in step_names(store))
    unfinished = folder / "step_00000099"
    shutil.copytree(store.latest().path, unfinished)
    (unfinished / "run_state.json").unlink()
    out["with an unmarked folder"] = [c.step for c in store.list()], store.latest().step
    again = CheckpointStore(folder, groups, keep_last=2, keep_best=True)
    out["reopened"] = [c.step for c in again.list()]
    out["leftover when reopened"] = [p.name for p in folder.glob("*.partial")]
    out["copies"] = copies_of_users(folder, policy, groups)
    return out


def copies_of_users(folder, policy, groups):
    """Steps that a store has, before and after it has saved twice, and what it left of folders beside it."""
    from megatron_dgpo.mcore.checkpoint import CheckpointStore

    store = CheckpointStore(folder, groups, keep_last=2, keep_best=True)
    copies = [folder / name for name in ("step_00000002.good", "step_00000002.old", "backup.partial")]
    for copy in copies:
        shutil.copytree(store.latest().path, copy)
    store = CheckpointStore(folder, groups, keep_last=2, keep_best=True)
    listed = [[c.path.name for c in store.list()]]
    for _ in range(2):  # the second replaces the first
        store.save(policy, {"step": 7, "world_size": 1})
        listed.append([c.path.name for c in store.list()])
    kept = {copy.name for copy in copies if (copy / "run_state.json").is_file()}
    rest = {p.name for p in folder.iterdir()} - set(listed[-1]) - {copy.name for copy in copies}
    return listed, kept, rest


def another_model(folder, policy, groups):
    """What a resumed run makes of weights that its config.json would give another meaning."""
    from megatron_dgpo.mcore.checkpoint import CheckpointStore, restore

    store = CheckpointStore(folder, groups)
    store.save(policy, {"step": 1, "world_size": 1})
    before, shape = exported(policy), policy.model.shape
    policy.model.shape = dataclasses.replace(shape, rope_theta=1e6, vocab_size=40)
    try:
        restore(policy, store.latest())
        error = "nothing was raised"
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    policy.model.shape = shape
    return error, same(exported(policy), before)


def step_names(store):
    return {c.path.name for c in store.list()}


def biggest(folder):
    return max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)


def truncate(folder):
    data = biggest(folder).read_bytes()
    biggest(folder).write_bytes(data[: len(data) // 2])


def flip(folder):
    """Some bytes in the middle of the numbers."""
    path = biggest(folder)
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 2, len(data) // 2 + 16):
        data[i] ^= 0x5A
    path.write_bytes(bytes(data))


def scramble_marker(folder):
    (folder / "run_state.json").write_text('{"step": 2, "wor')


DAMAGE = {
    "truncated": truncate,
    "flipped": flip,
    "file missing": lambda folder: biggest(folder).unlink(),
    "metadata missing": lambda folder: (folder / ".metadata").unlink(),
    "marker scrambled": scramble_marker,
}


def damaged(folder, policy, groups, how):
    """What a resumed run makes of a newest checkpoint that is not what was written."""
    from megatron_dgpo.mcore.checkpoint import CheckpointStore, restore

    store = CheckpointStore(folder, groups)
    for step in (1, 2):
        store.save(policy, {"step": step, "world_size": 1})
    DAMAGE[how](folder / "step_00000002")
    before = exported(policy)
    try:
        restore(policy, store.latest())
        error = "nothing was raised"
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    untouched = same(exported(policy), before)
    shutil.rmtree(folder / "step_00000002")  # as the message says
    restore(policy, store.latest())
    return error, untouched, store.latest().step


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    for tied in (True, False):
        # With two layers the parameters beside a tied embedding are no multiple of 128 on either stage: there
        # Megatron pads the bucket before the embedding's own.
        write_model(folder / f"tied{tied}", tied=tied, num_hidden_layers=2)
    ranks = run_ranks(two_ranks, 2, folder)
    alone = run_ranks(one_rank, 1, folder)
    return {key: [rank[key] for rank in world] for world in (ranks, alone) for key in world[0]}


def test_an_optimizer_that_makes_its_state_late_is_saved_at_any_time(results):
    """Before its first update as after it; and Transformer Engine's and torch's read each other's."""
    (pairs,) = results["lazy"]
    assert len(pairs) == 3
    for name, (got, want) in pairs.items():
        assert same(got["at"], want["at"]), name
        if ", " not in name:
            assert got["rows"] == want["rows"] and same(got["after"], want["after"]), name
        for row, expected in zip(got["rows"], want["rows"], strict=True):
            assert row == pytest.approx(expected, rel=1e-6), name
        assert largest_difference(got["after"], want["after"]) < 1e-6, name


def test_a_checkpoint_of_the_torch_spec_loads_into_layers_with_more_state(results):
    (got,) = results["more state"]
    assert len(got["asked for"]) == 2, "a layer each"
    assert same(got["restored"], got["want"]) and same(got["imported"], got["want"])


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


def largest_difference(a, b):
    assert set(a) == set(b)
    return max(float((a[n].float() - b[n].float()).abs().max()) for n in a)


@pytest.mark.parametrize("saved", SAVED)
def test_a_restored_run_continues_bit_for_bit(results, saved):
    for result in results[saved]:
        went_on, restored = result["went on"], result["restored"]
        assert same(restored["at"], went_on["at"])
        assert restored["rows"] == went_on["rows"]
        assert same(restored["after"], went_on["after"])
        assert result["reference kept"]
        rates = [row[2] for row in result["first"] + restored["rows"]]
        assert rates == pytest.approx(RATES, rel=1e-12), "the schedule goes on where it was"
        losses = [row[0] for row in result["first"] + restored["rows"]]
        assert len(set(losses)) == BEFORE + AFTER, "every update moves the weights, the first one too"
        assert went_on["rows"][-1][0] < 0.95 * result["first"][0][0], "the run learns"


@pytest.mark.parametrize("saved", [s for s in SAVED if SAVED[s][2] == "float32"])
def test_weights_alone_continue_otherwise(results, saved):
    """So the comparisons above and below would notice a lost optimizer or schedule."""
    for result in results[saved]:
        assert same(result["bare"]["at"], result["went on"]["at"])
        assert largest_difference(result["bare"]["after"], result["went on"]["after"]) > 1e-3


@pytest.mark.parametrize(("saved", "name"), RESHARDED)
def test_another_split_continues_the_run(results, saved, name):
    want = results[saved][0]["went on"]
    for got in results[saved, name]:
        assert same(got["at"], want["at"]), "the weights have changed on the way"
        for row, expected in zip(got["rows"], want["rows"], strict=True):
            assert row[:2] == pytest.approx(expected[:2], rel=1e-6)
            assert row[2] == expected[2]
        assert largest_difference(got["after"], want["after"]) < 1e-6


def test_the_newest_and_the_best_are_kept(results):
    (kept,) = results["kept"]
    assert kept["after save"] == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]
    assert kept["best"] == 2


def test_a_failed_save_removes_nothing(results):
    (kept,) = results["kept"]
    assert kept["after failure"] == [2, 4, 5]
    assert kept["leftover"] == ["step_00000006.partial"]
    assert kept["reopened"] == [2, 4, 5] and kept["leftover when reopened"] == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_save_does_not_change_how_a_rank_ends_with_torchrun(results):
    """Whoever writes the files, the rank still gets SIGTERM then, and time to save."""
    assert results["signal"] == [signal.SIGTERM]


def test_copies_that_a_user_made_are_neither_read_nor_removed(results):
    (kept,) = results["kept"]
    listed, copies, rest = kept["copies"]
    before = ["step_00000002", "step_00000004", "step_00000005"]
    after = ["step_00000002", "step_00000005", "step_00000007"]
    assert listed == [before, after, after]
    assert copies == {"step_00000002.good", "step_00000002.old", "backup.partial"}
    assert rest == {"step_00000099"}, "unmarked, and nothing else"


def test_a_model_that_has_changed_since_the_save_is_refused_by_field(results):
    (error, untouched) = results["another model"][0]
    says = "vocab_size is 40 in config.json, and the weights were saved with 45; "
    says += "rope_theta is 1000000.0 in config.json, and the weights were saved with 500.0"
    assert error.startswith("ValueError: ") and error.endswith(f"step_00000001: {says}")
    assert untouched


def test_a_folder_without_its_marker_is_no_checkpoint(results):
    (kept,) = results["kept"]
    assert kept["with an unmarked folder"] == ([2, 4, 5], 5)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_checkpoint_is_refused_by_name(results, how):
    (damaged,) = results["damaged"]
    error, untouched, step_after_removal = damaged[how]
    file = {"metadata missing": ".metadata", "marker scrambled": "run_state.json"}.get(how, ".distcp")
    assert error.startswith("ValueError: ") and file in error and "step_00000002" in error
    assert "remove this folder" in error and "\n" not in error
    assert untouched and step_after_removal == 1
