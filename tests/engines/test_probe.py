"""What the probe of a sync scores, what it lets pass, and what it finds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import VOCAB, write_model

from megatron_dgpo import platform
from megatron_dgpo.config import ParallelConfig, SyncConfig
from megatron_dgpo.learner import score_sequences
from megatron_dgpo.mcore.hf_config import ModelShape
from megatron_dgpo.mcore.model import build_model
from megatron_dgpo.mcore.policy import Frozen
from megatron_dgpo.rollout.embedded import EmbeddedEngine
from megatron_dgpo.rollout.engine import SamplingParams
from megatron_dgpo.types import Group, Prompt, Sample
from megatron_dgpo.weights import convert
from megatron_dgpo.weights.sync import SyncMismatch, WeightSync, probe_ids, text_ids

PROMPTS = [Prompt(f"p{i}", tuple(range(1, 40 + i)), "", "") for i in range(6)]


def group(prompt: Prompt, *responses: list[int]) -> Group:
    samples = [Sample(prompt, i, ids, [0.0] * len(ids), "stop", ()) for i, ids in enumerate(responses)]
    return Group(prompt, samples)


@pytest.mark.parametrize(
    ("prompt", "response", "positions", "wanted"),
    [
        (range(100), [], 4096, [*range(68, 100)]),
        (range(100), [7] * 40, 4096, [*range(84, 100), *[7] * 16]),
        (range(100), [7, 8], 4096, [*range(70, 100), 7, 8]),
        ([5], [7, 8], 4096, [5, 7, 8]),
        ([5], [], 4096, [5]),
        (range(100), [7] * 40, 20, [99, *[7] * 13]),
        ([5, 998, 999], [999], 4096, [5, 998, 998, 998]),
    ],
)
def test_the_probe_scores_where_a_prompt_goes_over_into_its_response(
    prompt: Any, response: list[int], positions: int, wanted: list[int]
) -> None:
    assert text_ids(prompt, response, 1000, positions) == wanted


class Engine:
    """Takes everything, and gives log-probs that are off by `gap`."""

    weight_version = 0
    everywhere = False

    def __init__(self, gap: float) -> None:
        self.gap = gap
        self.scored: list[list[list[int]]] = []

    def update_weights_by_stage(self, buckets: Any, version: int) -> bool:
        return False

    def probe(self, ids: list[list[int]]) -> dict[str, list[list[float]]]:
        self.scored.append(ids)
        return {"http://a": [[self.gap - 1.0] * (len(row) - 1) for row in ids]}


def sync_to(
    engine: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, *more: Any, **config: Any
) -> WeightSync:
    monkeypatch.setattr(platform, "gather_objects", lambda value, world: [value])
    shape = SimpleNamespace(vocab_size=1000, max_positions=4096)
    model: Any = SimpleNamespace(parameters=lambda: iter([torch.zeros(1, dtype=dtype)]), shape=shape)
    groups: Any = SimpleNamespace(world=None)

    def score(ids: Any) -> list[list[float]]:
        return [[-1.0] * (len(row) - 1) for row in ids]

    return WeightSync(model, groups, engine, SyncConfig(**config), score, *more)


def test_the_run_s_own_prompts_and_responses_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(0.0)
    sync = sync_to(engine, torch.float32, monkeypatch, PROMPTS)
    sync.push(0)
    groups = [group(p, [p.token_ids[0] + 500] * 3, [900]) for p in PROMPTS[2:]]
    sync.probe_with(groups)
    sync.push(1)
    sync.probe_with([])  # a replica without a group in a step
    sync.push(2)
    prompts, *responses = engine.scored
    assert prompts == [list(p.token_ids[-32:]) for p in PROMPTS[:4]]
    assert responses == 2 * [[[*p.token_ids[-29:], 501, 501, 501] for p in PROMPTS[2:6]]]
    fixed = Engine(0.3)  # in bfloat16 more is let pass on ids that are no text
    sync_to(fixed, torch.bfloat16, monkeypatch, [Prompt("short", (1,), "", "")]).push(0)
    assert fixed.scored == [probe_ids(1000, 4096)]
    assert [len(ids) for ids in fixed.scored[0]] == [32] * 4 and max(map(max, fixed.scored[0])) < 999


@pytest.mark.parametrize(
    ("dtype", "gap", "config", "passes"),
    [
        (torch.bfloat16, 0.13, {}, True),  # twice what correct implementations were seen to differ by
        (torch.bfloat16, 0.25, {}, False),
        (torch.float32, 5e-4, {}, True),
        (torch.float32, 2e-3, {}, False),
        (torch.bfloat16, 0.13, {"max_log_prob_gap": 0.1}, False),
        (torch.bfloat16, float("nan"), {}, False),
    ],
)
def test_bounds_of_the_gap(
    dtype: torch.dtype, gap: float, config: dict[str, float], passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = sync_to(Engine(gap), dtype, monkeypatch, PROMPTS, **config)
    if passes:
        found = sync.push(0)
        assert found is not None and found.mean == pytest.approx(gap)
    else:
        with pytest.raises(SyncMismatch, match="http://a gives log-probs that differ"):
            sync.push(0)


def test_a_wrong_tensor_in_one_layer_is_found_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's model and transformers', both in bfloat16, on the engine's own responses."""
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
    folder = write_model(tmp_path, tied=False, dtype=torch.bfloat16, **shape)
    with platform.distributed(ParallelConfig(device="cpu"), seed=1) as groups:
        model = build_model(
            ModelShape.from_folder(folder), ParallelConfig(), groups, params_dtype=torch.bfloat16
        )
        convert.load_folder(model, groups, folder)
        engine = EmbeddedEngine(folder, dtype=torch.bfloat16, device=groups.device, max_batch_size=64)
        score = partial(score_sequences, Frozen(model, groups), max_tokens=4096)
        prompts = [Prompt(f"p{i}", tuple((i * k) % VOCAB for k in range(1, 20)), "", "") for i in range(1, 5)]
        sync = WeightSync(model, groups, engine, SyncConfig(), score, prompts)
        at_first = sync.push(0)
        sync.probe_with(engine.generate(prompts, SamplingParams(max_new_tokens=16)))
        then = sync.push(1)
        for gap in (at_first, then):
            assert gap is not None and 0 < gap.mean < 0.05
        take = engine.update_weights
        for version, part in enumerate(("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"), 2):
            name = f"model.layers.2.{part}.weight"

            def with_one_wrong(stream: Any, version: int, name: str = name) -> None:
                take(((key, t.flip(0) if key == name else t) for key, t in stream), version)

            monkeypatch.setattr(engine, "update_weights", with_one_wrong)
            with pytest.raises(SyncMismatch, match="sync.max_log_prob_gap"):
                sync.push(version)
        engine.close()
