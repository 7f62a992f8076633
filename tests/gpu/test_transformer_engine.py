"""Transformer Engine's layer spec on a GPU: its numbers, its optimizer's checkpoints, its fusions."""

from __future__ import annotations

import os

import pytest
import torch
from tiny import config, sequences, split, write_model

from megatron_dgpo.config import OptimizerConfig

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device (make test-gpu)", allow_module_level=True)


def why_not() -> str:
    from megatron_dgpo.mcore.layers import why_no_transformer_engine

    return why_no_transformer_engine()


def policy_of(c, groups, **model):
    from megatron_dgpo.run import build_policy

    parallel = c.parallel.model_copy(update={"device": "cuda"})
    optimizer = OptimizerConfig(lr=1e-2, adam_eps=1e-3)
    changed = {"model": c.model.model_copy(update=model), "parallel": parallel, "optimizer": optimizer}
    return build_policy(c.model_copy(update=changed), groups, total_updates=8, keep_reference=False)


def work(policy):
    """(T, H) hidden states on the CPU, and the gradient norm of one update after them."""
    from megatron_dgpo.data.packing import PackItem, pack
    from megatron_dgpo.learner import supervised_loss

    batches = pack([PackItem(*pair) for pair in sequences()], max_tokens=60, device=policy.groups.device)
    for batch in batches:
        batch.coefficients_T = batch.loss_mask_T.float() / 100
    hidden = torch.cat(policy.forward(batches, lambda h, w, b: h.float().cpu()))
    return hidden, policy.update(batches, supervised_loss(policy)).grad_norm


def on_gpu(c):
    """This process as the only rank."""
    return split(c.model_copy(update={"parallel": c.parallel.model_copy(update={"device": "cuda"})}))


def specs(folder):
    """Both specs in bfloat16 against float32, fused and not; and what the torch spec calls its parameters."""
    c = config(folder / "model", dtype="bfloat16")
    off = dict.fromkeys(("bias_activation_fusion", "bias_dropout_fusion"), False)
    out = {}
    with on_gpu(c) as groups:
        for name, model in {
            "exact": dict(params_dtype="float32", layer_spec="torch", transformer=off),
            "torch": dict(layer_spec="torch"),
            "torch, not fused": dict(layer_spec="torch", transformer=off),
            "engine": dict(layer_spec="transformer_engine"),
            "engine, its rotation": dict(
                layer_spec="transformer_engine", transformer={"apply_rope_fusion": True}
            ),
        }.items():
            out[name] = work(policy_of(c, groups, **model))
    return out


def checkpoints(folder):
    """FusedAdam before its first update and after it, restored; and the torch spec's checkpoints under it."""
    from megatron_dgpo.mcore.checkpoint import CheckpointStore, restore
    from megatron_dgpo.mcore.policy import the_optimizer

    c = config(folder / "model", dtype="bfloat16")
    out = {}
    with on_gpu(c) as groups:
        for saved in ("transformer_engine", "torch"):
            for updates in (0, 2):
                policy = policy_of(c, groups, layer_spec=saved)
                out["optimizer"] = type(the_optimizer(policy.optimizer).optimizer).__name__
                for _ in range(updates):
                    work(policy)
                store = CheckpointStore(folder / f"{saved}{updates}", groups)
                store.save(policy, {"step": updates, "world_size": 1})
                again = policy_of(c, groups, layer_spec="transformer_engine")
                restore(again, store.latest())
                parameters = zip(policy.model.parameters(), again.model.parameters(), strict=True)
                out[saved, updates, "weights"] = all(torch.equal(a, b) for a, b in parameters)
                if saved == "transformer_engine":
                    went_on, restored = work(policy), work(again)
                    out[saved, updates, "next"] = torch.equal(went_on[0], restored[0])
                    parameters = zip(policy.model.parameters(), again.model.parameters(), strict=True)
                    out[saved, updates, "after"] = all(torch.equal(a, b) for a, b in parameters)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    write_model(folder / "model", tied=False, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    return folder


def needs_transformer_engine():
    if missing := why_not():
        pytest.skip(f"needs Transformer Engine: {missing}")


def test_both_specs_are_as_far_from_float32_as_bfloat16_takes_them(folder):
    needs_transformer_engine()
    got = specs(folder)
    hidden, norm = got.pop("exact")
    bound = 2 * float((got["torch"][0] - hidden).abs().max()) + 2**-6
    for name, (other, of_update) in got.items():
        assert float((other - hidden).abs().max()) <= bound, name
        assert of_update == pytest.approx(norm, rel=0.02), name


def test_fused_adam_is_saved_at_any_time_and_reads_the_torch_specs_checkpoints(folder):
    needs_transformer_engine()
    got = checkpoints(folder)
    assert got.pop("optimizer") == "FusedAdam"
    assert got and all(got.values()), got


def test_float32_products_are_float32_where_the_environment_allows_less(monkeypatch):
    """TF32 keeps 10 bits: its products of 4,096 numbers are off by 1e-3 of their size, float32's by 1e-6."""
    from megatron_dgpo import platform

    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    torch.set_float32_matmul_precision("high")
    platform.use_device("cuda", 1)
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 4096, generator=draw) for _ in range(2))
    want = a.double() @ b.double().t()
    error = ((a.cuda() @ b.cuda().t()).double().cpu() - want).abs().max() / want.abs().max()
    assert float(error) < 1e-5
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
