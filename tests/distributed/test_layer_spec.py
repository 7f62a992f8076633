"""Transformer Engine's layer spec in our attention, with a core attention of its interface (it needs a GPU
itself), the rotation, fusions, and what the choice of a spec says."""

from __future__ import annotations

import logging
from unittest import mock

import pytest
import torch
from spawn import run_ranks
from tiny import config, sequences, split, write_model

from megatron_dgpo.config import ModelConfig


class CoreAttention(torch.nn.Module):
    """Takes what Megatron's TEDotProductAttention takes, and attends within each sequence in float64."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, cp_comm_type=None, **options):
        super().__init__()
        self.fuse_wgrad_accumulation = False
        self.mask = attn_mask_type

    def forward(self, query, key, value, attention_mask, attn_mask_type, packed_seq_params):
        assert attention_mask is None and attn_mask_type == self.mask and attn_mask_type.name == "causal"
        assert packed_seq_params.qkv_format == "thd" and packed_seq_params.cu_seqlens_q.dtype == torch.int32
        ends = packed_seq_params.cu_seqlens_q.tolist()
        assert packed_seq_params.max_seqlen_q == max(b - a for a, b in zip(ends, ends[1:], strict=False))
        out = []
        for start, end in zip(ends, ends[1:], strict=False):
            q, k, v = (x[start:end].transpose(0, 1).double() for x in (query, key, value))
            k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
            scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
            out.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        return torch.cat(out).to(query.dtype).flatten(1)


def transformer_engines(qk_layernorm):
    """Megatron's own spec of this name, from parts that run on a CPU."""
    from megatron.core.transformer.attention import SelfAttention

    from megatron_dgpo.mcore.layers import torch_layer_spec

    spec = torch_layer_spec(qk_norm=qk_layernorm)
    spec.submodules.self_attention.module = SelfAttention
    spec.submodules.self_attention.submodules.core_attention = CoreAttention
    return spec


def attempt(c, groups):
    """(hidden states of all sequences, gradient norm of an update, number of micro-batches, the policy)"""
    from megatron_dgpo.data.packing import PackItem, pack
    from megatron_dgpo.learner import supervised_loss
    from megatron_dgpo.run import build_policy

    policy = build_policy(c, groups, total_updates=1, keep_reference=False)
    batches = pack([PackItem(*pair) for pair in sequences()], max_tokens=60)
    for batch in batches:
        batch.coefficients_T = batch.loss_mask_T.float() / 100
    hidden = torch.cat(policy.forward(batches, lambda h, w, b: h.clone()))
    norm = policy.update(batches, supervised_loss(policy)).grad_norm
    return hidden, norm, len(batches), policy


def one_rank(rank, world_size, folder):
    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_dgpo import platform
    from megatron_dgpo.mcore import layers

    c = config(folder / "model")
    said = []
    watch = logging.Handler()
    watch.emit = lambda record: said.append(record.getMessage())
    layers.log.addHandler(watch)
    layers.log.setLevel(logging.INFO)
    out = {}
    with split(c) as groups:
        *out["torch"], _ = attempt(c, groups)
        again = {"recompute_granularity": "selective"}
        recomputing = c.model_copy(update={"model": c.model.model_copy(update={"transformer": again})})
        calls = []
        original = layers.PackedSDPA.forward
        with mock.patch.object(layers.PackedSDPA, "forward", lambda *a: (calls.append(1), original(*a))[1]):
            *out["selective"], _ = attempt(recomputing, groups)
        out["calls"] = len(calls)
        out["rotated"] = rotated(c, groups)
        engine = ModelConfig(path=c.model.path, layer_spec="transformer_engine")
        with (
            mock.patch.object(layers, "why_no_transformer_engine", lambda: ""),
            mock.patch.object(
                gpt_layer_specs, "get_gpt_layer_with_transformer_engine_spec", transformer_engines
            ),
            mock.patch("megatron.core.transformer.transformer_block.TENorm", layers.RMSNorm, create=True),
            mock.patch("megatron.core.transformer.transformer_block.LayerNormImpl", layers.RMSNorm),
        ):
            *out["engine"], policy = attempt(c.model_copy(update={"model": engine}), groups)
        out["kinds"] = {type(m).__name__ for m in policy.model.modules()}
        out["float32 sums"] = [
            m.fuse_wgrad_accumulation for m in policy.model.modules() if isinstance(m, CoreAttention)
        ]
        out["fusions"] = fusions(c, policy.shape, platform)
    out["said"] = said
    return out


def rotated(c, groups):
    """[(queries by us, by Megatron, our operations, Megatron's)] by precision and number of sequences."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

    from megatron_dgpo.mcore.layers import rotate

    inverse = 500.0 ** -(torch.arange(0, 8, 2) / 8)
    out = []
    for dtype in (torch.float32, torch.bfloat16):
        for lengths in ((130,), (3, 1, 40) * 20):
            ends = torch.tensor([0, *lengths]).cumsum(0).int()
            positions = torch.cat([torch.arange(n) for n in lengths])
            queries = torch.randn(int(ends[-1]), 4, 8).to(dtype)
            angles = torch.cat([torch.outer(positions.float(), inverse)] * 2, dim=-1).unsqueeze(1)
            rope = torch.stack((angles.cos(), angles.sin())).to(dtype)
            table = torch.cat([torch.outer(torch.arange(200.0), inverse)] * 2, dim=-1)[:, None, None]
            with Operations() as ours:
                got = rotate(queries, rope)
            with Operations() as theirs:
                want = _apply_rotary_pos_emb_thd(queries, ends, table, cp_group=groups.cp)
            out.append((got, want, ours.count, theirs.count))
    return out


class Operations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def fusions(c, shape, platform):
    """Fields of Megatron's config on a CPU, on a GPU with and without Apex's extension, and as users want."""
    from megatron_dgpo.mcore.model import parallel_layers, transformer_config

    names = ("bias_activation_fusion", "bias_dropout_fusion", "gradient_accumulation_fusion")

    def fields(gpu, extension, **overrides):
        with (
            mock.patch.object(platform, "has_gpu", lambda: gpu),
            mock.patch.object(parallel_layers, "_grad_accum_fusion_available", extension),
        ):
            made = transformer_config(shape, c.parallel, torch.bfloat16, overrides)
        return [getattr(made, name) for name in (*names, "apply_rope_fusion")]

    off = dict.fromkeys(names, False)
    return fields(False, True), fields(True, True), fields(True, False), fields(True, True, **off)


@pytest.fixture(scope="module")
def got(tmp_path_factory):
    folder = tmp_path_factory.mktemp("specs")
    write_model(folder / "model", tied=True, num_hidden_layers=2)
    return run_ranks(one_rank, 1, folder)[0]


def test_the_core_attention_of_the_other_spec_gets_rotated_queries_and_keys(got):
    """The numbers are those of the torch spec, which are transformers' (test_model.py)."""
    (hidden, norm, _), (want, want_norm, _) = got["engine"], got["torch"]
    torch.testing.assert_close(hidden, want, rtol=1e-5, atol=1e-5)
    assert norm == pytest.approx(want_norm, rel=1e-5)
    assert {"PackedSelfAttention", "CoreAttention"} <= got["kinds"] and "SelfAttention" not in got["kinds"]


def test_transformer_engines_layers_add_gradients_in_float32(got):
    assert got["float32 sums"] == [True, True]


def test_attention_is_computed_again_where_that_is_asked_for(got):
    (hidden, norm, batches), layers = got["selective"], 2
    assert torch.equal(hidden, got["torch"][0]) and norm == got["torch"][1]
    assert got["calls"] == 3 * layers * batches, "the pass without gradients, forward, again"


def test_the_rotation_is_megatrons_whatever_the_number_of_sequences(got):
    for ours, theirs, _, _ in got["rotated"]:
        assert torch.equal(ours, theirs)
    (_, _, one, _), (_, _, many, megatrons) = got["rotated"][:2]
    assert one == many < megatrons / 5


def test_fusions_are_a_gpus_and_can_be_switched_off(got):
    on_cpu, on_gpu, without_apex, switched_off = got["fusions"]
    assert on_cpu == [False] * 4 and switched_off == [False] * 4
    assert on_gpu == [True, True, True, False] and without_apex == [True, True, False, False]


def test_the_choice_and_its_reason_are_said(got):
    assert got["said"] == [
        *["layer spec: torch (Transformer Engine has no float32 attention for packed sequences)"] * 2,
        "layer spec: transformer_engine (model.layer_spec asks for it)",
    ]
