"""Every family at every split against transformers: logits, log-probs, gradients, import and export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from spawn import run_ranks
from tiny import FAMILIES, SPLITS, VOCAB, config, hf_model, hf_tensors, sequences, split, write_model

TIED = (True, False)
TRIPS = [(name, tied) for name in SPLITS for tied in TIED]
CASES = [("qwen2", name, tied) for name, tied in TRIPS] + [
    (family, name, tied)
    for family in FAMILIES
    if family != "qwen2"
    for name, tied in TRIPS
    # One of both is enough where the embedding is neither split over stages nor the only thing split.
    if (name, tied) not in (("DP=2", True), ("TP=2 SP", False))
]
"""(family, split, tied)."""
BUDGET = 60
"""Tokens of a micro-batch: the sequences make several."""


def logits_of(policy, hidden, weight, batch):
    """(T, VOCAB) logits, gathered over the tensor-parallel ranks."""
    groups = policy.groups
    if policy.config.sequence_parallel:
        parts = [torch.empty_like(hidden) for _ in range(groups.tp.size())]
        dist.all_gather(parts, hidden.contiguous(), group=groups.tp)
        hidden = torch.cat(parts)
    local = hidden @ weight.t()
    parts = [torch.empty_like(local) for _ in range(groups.tp.size())]
    dist.all_gather(parts, local, group=groups.tp)
    return torch.cat(parts, dim=1)[: batch.num_tokens, :VOCAB]


def by_sequence(batches, values, count):
    """`count` tensors of all positions of each sequence, from one tensor a micro-batch."""
    out = {}
    for batch, value in zip(batches, values, strict=True):
        parts = value[: batch.cu_seqlens[-1]].split(batch.cu_seqlens.diff().tolist())
        out.update(zip(batch.sample_ids, parts, strict=True))
    assert sorted(out) == list(range(count))
    return [out[i].clone() for i in range(count)]


def keep_gradients(policy):
    """A list that gets the name and gradient of every tensor, complete and not clipped, at each update."""
    from megatron_dgpo.weights.export import export_stream

    kept = []
    finalize = policy.config.finalize_model_grads_func

    def finalize_and_keep(*args, **kwargs):
        finalize(*args, **kwargs)
        stream = export_stream(policy.model, policy.groups, value=lambda p: p.main_grad)
        kept.append({n: g.clone() for n, g in stream})

    policy.config.finalize_model_grads_func = finalize_and_keep
    return kept


def shared(policy, groups):
    """The tensors that an engine of this rank may hold itself, and whether they are the policy's."""
    from megatron_dgpo.weights.export import export_stream, shared_tensors

    found = shared_tensors(policy.model, groups)
    if not found:
        return set(), True
    memories = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    same = all(t.untyped_storage().data_ptr() in memories for t in found.values())
    equal = all(torch.equal(t, found[n]) for n, t in export_stream(policy.model, groups) if n in found)
    return set(found), same and equal


def work_at(family, name, folder, tied):
    from megatron_dgpo.data.packing import PackItem, pack
    from megatron_dgpo.learner import policy_stats, supervised_loss
    from megatron_dgpo.run import build_policy
    from megatron_dgpo.weights.convert import save_hf

    c = config(folder / f"{family}{tied}", **SPLITS[name])
    with split(c) as groups:
        policy = build_policy(c, groups, total_updates=1, keep_reference=False)
        pairs = sequences()
        batches = pack([PackItem(*p) for p in pairs], max_tokens=BUDGET)
        assert len(batches) > 1

        def log_probs():
            values = policy.forward(batches, lambda h, w, b: policy_stats(policy, h, w, b).log_probs)
            return by_sequence(batches, values, len(pairs)) if values else None

        def logits(hidden, weight, batch):
            return logits_of(policy, hidden, weight, batch)

        got = {"logits": None, "log_probs": log_probs(), "shared": shared(policy, groups)}
        if values := policy.forward(batches, logits):
            got["logits"] = by_sequence(batches, values, len(pairs))
        for batch in batches:
            batch.coefficients_T = batch.loss_mask_T.float() / 100
        gradients = keep_gradients(policy)
        policy.update(batches, supervised_loss(policy))
        (got["gradients"],) = gradients
        got["log_probs_after"] = log_probs()
        # Several files where small, one where large: both are read by transformers.
        limit = 20_000 if name == "TP=2" else 1 << 30
        save_hf(policy.model, groups, c.model.path, folder / f"{family}{name}{tied}", shard_bytes=limit)
    return got


def round_trip_at(name, folder, tied, dtype):
    """Names and tensors that come back from import and export."""
    from megatron_dgpo.mcore.model import ModelShape, build_model
    from megatron_dgpo.run import DTYPES
    from megatron_dgpo.weights.convert import folder_source, load_hf
    from megatron_dgpo.weights.export import export_stream

    source = folder / f"{dtype}{tied}"
    c = config(source, dtype=dtype, **SPLITS[name])
    with split(c) as groups:
        model = build_model(ModelShape.from_folder(source), c.parallel, groups, params_dtype=DTYPES[dtype])
        names, read = folder_source(source)
        load_hf(model, groups, names, read)
        small = [(n, t.clone()) for n, t in export_stream(model, groups, bucket_bytes=9000)]
        large = [(n, t.clone()) for n, t in export_stream(model, groups)]
        errors = refused(model, groups, names, read) if (tied, dtype) == (False, "float32") else {}
    return small, large, errors


BAD_SHAPES = {
    "model.embed_tokens.weight": lambda t: t[:40],  # padding must not fill up for it
    "lm_head.weight": lambda t: torch.cat((t, t)),
    "model.layers.1.self_attn.k_proj.weight": lambda t: t[:-1],
    "model.layers.2.self_attn.v_proj.bias": lambda t: t[:-8],
    "model.layers.0.self_attn.q_proj.weight": lambda t: t.t()[:, :31],
    "model.layers.3.self_attn.o_proj.weight": lambda t: t[:, :-2],
    "model.layers.2.mlp.up_proj.weight": lambda t: t[:-2],
    "model.norm.weight": lambda t: t[:-1],
}


def refused(model, groups, names, read):
    """What load_hf says to each wrong list of names and each wrong shape."""
    from megatron_dgpo.weights.convert import load_hf

    def attempt(names, read):
        try:
            load_hf(model, groups, names, read)
        except Exception as error:
            return type(error).__name__, str(error)
        return "accepted", ""

    out = {
        "missing": attempt([n for n in names if n != "model.layers.1.mlp.up_proj.weight"], read),
        "unknown": attempt([*names, "model.layers.0.self_attn.q_norm.weight"], read),
        "too many layers": attempt([*names, "model.layers.4.input_layernorm.weight"], read),
    }
    for bad, change in BAD_SHAPES.items():
        out[bad] = attempt(names, lambda n, bad=bad, change=change: change(read(n)) if n == bad else read(n))

    # The sum of gate and up is right, each of them is wrong.
    def uneven(name):
        tensor = read(name)
        if name == "model.layers.0.mlp.gate_proj.weight":
            return torch.cat((tensor, tensor[:8]))
        return tensor[:-8] if name == "model.layers.0.mlp.up_proj.weight" else tensor

    out["gate and up"] = attempt(names, uneven)
    return out


def work(rank, world_size, folder):
    torch.manual_seed(0)
    results = {case: work_at(*case[:2], folder, case[2]) for case in CASES}
    for name, tied in TRIPS:
        for dtype in ("float32", "bfloat16"):
            results["trip", name, tied, dtype] = round_trip_at(name, folder, tied, dtype)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    for tied in TIED:
        for family in FAMILIES:
            write_model(path / f"{family}{tied}", family=family, tied=tied)
        for dtype in ("float32", "bfloat16"):
            write_model(path / f"{dtype}{tied}", tied=tied, seed=9, dtype=getattr(torch, dtype))
    return path


@pytest.fixture(scope="module")
def ranks(folder):
    return run_ranks(work, 2, folder)


def speakers(ranks, key, what):
    """The results of the ranks that have one: all but those of earlier pipeline stages."""
    found = [r[key][what] for r in ranks if r[key][what] is not None]
    assert len(found) == (1 if key[1] == "PP=2" else 2)
    return found


@torch.no_grad()
def transformers_logits(folder):
    model = hf_model(folder)
    return [model(torch.tensor([[*p, *r][:-1]])).logits[0] for p, r in sequences()]


def transformers_log_probs(folder):
    """Of the responses' tokens; 0 at the prompts'."""
    out = []
    for (prompt, response), z in zip(sequences(), transformers_logits(folder), strict=True):
        targets = torch.tensor([*prompt, *response][1:])
        out.append(F.log_softmax(z, -1).gather(1, targets[:, None])[:, 0])
        out[-1][: len(prompt) - 1] = 0
    return out


def transformers_gradients(folder):
    """Of the sum over response tokens of -log-prob / 100."""
    model = hf_model(folder)
    for prompt, response in sequences():
        ids = torch.tensor([[*prompt, *response]])
        logits = model(ids[:, :-1]).logits[0, len(prompt) - 1 :]
        (F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum") / 100).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def largest_difference(got, want):
    assert [g.shape for g in got] == [w.shape for w in want]
    return max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True))


# Logits are of size 1 to 10: 1e-5 is some 10 to 100 units in the last place, room for four layers of
# differently ordered sums; a wrong norm, angle or head moves them by 0.1 and more.
@pytest.mark.parametrize(("family", "name", "tied"), CASES)
def test_logits_and_log_probs_are_those_of_transformers(ranks, folder, family, name, tied):
    key = family, name, tied
    want = transformers_logits(folder / f"{family}{tied}")
    assert max(float(w.std()) for w in want) > 0.3, "the logits are too flat to tell anything"
    for got in speakers(ranks, key, "logits"):
        assert largest_difference(got, want) < 1e-5
    want = transformers_log_probs(folder / f"{family}{tied}")
    for got in speakers(ranks, key, "log_probs"):
        assert largest_difference(got, want) < 1e-5


@pytest.mark.parametrize(("family", "name", "tied"), CASES)
def test_all_but_qkv_can_be_shared_where_a_rank_has_the_whole_model(ranks, folder, family, name, tied):
    every = set(hf_tensors(folder / f"{family}{tied}"))
    wanted = {n for n in every if not any(f"{x}_proj" in n for x in "qkv")} if name == "DP=2" else set()
    for rank in ranks:
        names, right = rank[family, name, tied]["shared"]
        assert names == wanted and right


# A gradient is a sum over some 90 tokens, and its error is one of rounding relative to its largest entry.
# A norm of queries or keys whose gradient stays that of one rank's heads is off by about its own size.
@pytest.mark.parametrize(("family", "name", "tied"), [c for c in CASES if c[1] != "DP=2"])
def test_all_gradients_are_those_of_transformers(ranks, folder, family, name, tied):
    want = transformers_gradients(folder / f"{family}{tied}")
    assert min(float(g.abs().max()) for g in want.values()) > 1e-4, "nothing to compare"
    for rank in ranks:
        got = rank[family, name, tied]["gradients"]
        assert set(got) == set(want)
        for tensor, gradient in want.items():
            apart = float((got[tensor] - gradient).abs().max() / gradient.abs().max())
            assert apart < 1e-5, (tensor, apart)


@pytest.mark.parametrize(("family", "name", "tied"), CASES)
def test_transformers_reads_the_updated_policy_from_its_export(ranks, folder, family, name, tied):
    start, export = folder / f"{family}{tied}", folder / f"{family}{name}{tied}"
    want = transformers_log_probs(export)
    assert largest_difference(want, transformers_log_probs(start)) > 0.05, "nothing changed"
    for got in speakers(ranks, (family, name, tied), "log_probs_after"):
        assert largest_difference(got, want) < 1e-5
    assert (len(list(export.glob("*.safetensors"))) > 1) == (name == "TP=2")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "tied"), TRIPS)
def test_import_then_export_returns_every_tensor_bit_for_bit(ranks, folder, name, tied, dtype):
    want = hf_tensors(folder / f"{dtype}{tied}")
    assert len({tuple(t.flatten()[:8].tolist()) for t in want.values()}) == len(want), "not distinct"
    assert ("lm_head.weight" in want) != tied
    for rank in ranks:
        small, large, _ = rank["trip", name, tied, dtype]
        for stream in (small, large):
            names = [n for n, _ in stream]
            assert sorted(names) == sorted(want), "each name exactly once"
            wrong = [n for n, t in stream if t.dtype != want[n].dtype or not torch.equal(t, want[n])]
            assert not wrong


@pytest.mark.parametrize("name", SPLITS)
def test_wrong_tensors_are_refused_by_name(ranks, name):
    for rank, result in enumerate(ranks):
        errors = dict(result["trip", name, False, "float32"][2])
        kind, message = errors.pop("missing")
        assert kind == "KeyError" and "model.layers.1.mlp.up_proj.weight" in message
        kind, message = errors.pop("unknown")
        assert kind == "KeyError" and "model.layers.0.self_attn.q_norm.weight" in message
        kind, message = errors.pop("too many layers")
        assert kind == "KeyError" and "model.layers.4.input_layernorm.weight" in message
        kind, message = errors.pop("gate and up")
        if owns(name, rank, "model.layers.0."):
            assert kind == "ValueError" and "model.layers.0.mlp.gate_proj.weight" in message
        for bad, (kind, message) in errors.items():
            if owns(name, rank, bad):
                assert kind == "ValueError" and message.startswith(f"{bad}:"), (bad, kind, message)


def owns(name, rank, tensor):
    """A pipeline stage reads its own tensors alone."""
    if name != "PP=2":
        return True
    first = any(part in tensor for part in ("embed_tokens", "layers.0.", "layers.1."))
    return first == (rank == 0)
