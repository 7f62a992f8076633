"""What a config.json is translated to, and each field that is refused, by name."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import patience

from megatron_dgpo.mcore import hf_fields
from megatron_dgpo.mcore.hf_config import FAMILIES, IDENTITY, ModelShape, RopeScaling, remarks
from megatron_dgpo.mcore.model import scaled

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "eos_token_id": [128001, 128008],
    "vocab_size": 151936,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FILES: dict[str, dict[str, Any]] = {
    "qwen2": {
        **COMMON,
        **{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": False},
        **{"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28},
        **{"intermediate_size": 18944, "max_position_embeddings": 131072, "rms_norm_eps": 1e-06},
        **{"rope_theta": 1000000.0, "sliding_window": 131072, "max_window_layers": 28},
        **{"use_sliding_window": False, "use_mrope": False},
    },
    "qwen3": {
        **COMMON,
        **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True},
        **{"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 28},
        **{"intermediate_size": 3072, "max_position_embeddings": 40960, "rms_norm_eps": 1e-06},
        **{"rope_theta": 1000000, "rope_scaling": None, "head_dim": 128, "attention_bias": False},
        **{"sliding_window": None, "use_sliding_window": False, "max_window_layers": 28},
        "layer_types": ["full_attention"] * 28,
    },
    "llama": {
        **COMMON,
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False},
        **{"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32},
        **{"intermediate_size": 14336, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05},
        **{"rope_theta": 500000.0, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}},
        **{"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    },
}
"""Files as they are published, of each family."""


@pytest.mark.parametrize(
    ("family", "want"),
    [
        ("qwen2", dict(num_query_groups=4, head_dim=128, rope_theta=1e6, rope_scaling=None, norm_eps=1e-6)),
        ("qwen3", dict(num_query_groups=8, head_dim=128, rope_theta=1e6, rope_scaling=None, tied=True)),
        ("llama", dict(head_dim=128, rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))),
    ],
)
def test_published_files_are_translated(family, want):
    shape = ModelShape.from_hf(FILES[family])
    assert {name: getattr(shape, name) for name in want} == want
    assert shape.family == family and shape.vocab_size == 151936
    assert (shape.qkv_bias, shape.qk_norm) == (family == "qwen2", family == "qwen3")
    assert shape.num_layers == FILES[family]["num_hidden_layers"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_translated_alike(family):
    """Its own class fills in defaults and moves the rotary fields to rope_parameters."""
    from transformers import AutoConfig

    file = {k: v for k, v in FILES[family].items() if k != "model_type"}
    config = AutoConfig.for_model(family, **file)
    for written in (config.to_dict(), config.to_diff_dict()):
        assert "rope_parameters" in written and "rope_theta" not in written
        assert ModelShape.from_hf(written) == ModelShape.from_hf(FILES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_default_is_that_of_transformers(family):
    from transformers import AutoConfig

    given = {
        n: FILES[family][n] for n in FILES[family] if n.startswith(("num_", "model_type")) or "size" in n
    }
    given |= {"max_position_embeddings": 512, "head_dim": 96}
    if family == "llama":
        del given["head_dim"]
    config = AutoConfig.for_model(**given)
    assert ModelShape.from_hf(given) == ModelShape.from_hf(config.to_dict())


def test_llama_3_frequencies_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for scaling in (LLAMA3, {**LLAMA3, "factor": 32.0, "high_freq_factor": 3.0, "low_freq_factor": 0.5}):
        rope = {**scaling, "rope_type": "llama3", "rope_theta": 500000.0}
        config = LlamaConfig(hidden_size=4096, num_attention_heads=32, rope_parameters=rope)
        want = LlamaRotaryEmbedding(config).inv_freq
        plain = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
        shape = ModelShape.from_hf({**FILES["llama"], "rope_scaling": {**scaling, "rope_type": "llama3"}})
        assert shape.rope_scaling is not None
        torch.testing.assert_close(scaled(plain, shape.rope_scaling), want, rtol=1e-6, atol=0)
        assert not torch.allclose(plain, want, rtol=0.5)


GONE = object()
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", {"model_type": "gpt2"}, "model_type 'gpt2' is not supported (supported: qwen2, qwen3, llama)"),
    ("qwen2", {"model_type": GONE}, "model_type None is not supported"),
    ("qwen2", {"model_type": ["qwen2"]}, "model_type ['qwen2'] is not supported"),
    (
        "qwen2",
        {"architectures": ["Qwen2ForSequenceClassification"]},
        "architectures ['Qwen2ForSequenceClassification'] is not supported (Qwen2ForCausalLM is)",
    ),
    ("qwen3", {"architectures": "Qwen3ForCausalLM"}, "architectures 'Qwen3ForCausalLM' is not supported"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported (silu is)"),
    ("llama", {"hidden_act": None}, "hidden_act None is not supported (silu is)"),
    ("llama", {"attention_bias": True}, "attention_bias True is not supported (false is)"),
    ("llama", {"mlp_bias": True}, "mlp_bias True is not supported"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp 2 is not supported (1 is)"),
    ("qwen3", {"attention_bias": True}, "attention_bias True is not supported"),
    ("qwen2", {"attention_bias": False}, "attention_bias False has no counterpart"),
    ("qwen2", {"attention_bias": None}, "attention_bias None has no counterpart"),
    ("qwen2", {"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported (0.0 is)"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window True is not supported (false is)"),
    ("qwen2", {"use_mrope": True}, "use_mrope True is not supported"),
    (
        "qwen3",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types ['full_attention', 'sliding_attention'] is not supported (full_attention is)",
    ),
    ("llama", {"sliding_window": 4096}, "sliding_window 4096 has no counterpart"),
    ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ("qwen2", {"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4} has no counterpart"),
    ("qwen2", {"num_experts": 8}, "num_experts 8 has no counterpart"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved True is not supported (false is)"),
    ("llama", {"use_mrope": True}, "use_mrope True is not supported (false is)"),
    # defined by transformers' class, its base class or this family's, and not computed here
    ("llama", {"per_layer_config": {"1": {}}}, "per_layer_config {'1': {}} has no counterpart"),
    # not defined there, and named like a change of the computation
    *(
        (
            "llama",
            {name: 2},
            f"{name} 2 has no counterpart here (llama models are built without it); model.ignore_",
        )
        for name in (
            *("bias", "qkv_bias", "rope_is_neox_style", "scale_emb", "dim_model_base", "residualMultiplier"),
            *(
                "attention_chunk_size",
                "auto_map",
                "text_config",
                "vision_config",
                "kv_cache_dtype",
                "use_qk_norm",
            ),
            *(
                "num_nextn_predict_layers",
                "sparsity",
                "load_in_4bit",
                "hidden_dim",
                "padded_vocab_size",
                "lora_r",
            ),
        )
    ),
    ("qwen2", {"is_decoder": True}, "is_decoder True is not supported"),
    ("llama", {"logits_soft_cap": 30.0}, "logits_soft_cap 30.0 has no counterpart"),
    ("qwen2", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', not true or false"),
    # numbers
    *(
        (family, {name: GONE}, f"{name} is None, not a whole number")
        for family, name in [
            *(("llama", n) for n in ("num_attention_heads", "num_hidden_layers", "hidden_size")),
            *(("llama", n) for n in ("intermediate_size", "vocab_size", "max_position_embeddings")),
            *(("qwen2", "num_key_value_heads"), ("qwen3", "num_key_value_heads"), ("qwen3", "head_dim")),
        ]
    ),
    ("llama", {"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0, not a whole number"),
    ("llama", {"head_dim": "128"}, "head_dim is '128', not a whole number"),
    ("llama", {"vocab_size": 0}, "vocab_size is 0, not a whole number"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', not a number above 0"),
    ("llama", {"num_key_value_heads": 5}, "num_key_value_heads 5 does not divide num_attention_heads 32"),
    ("llama", {"hidden_size": 4100}, "num_attention_heads 32 does not divide hidden_size 4100"),
    ("qwen3", {"head_dim": 63}, "head_dim is odd"),
    # rotary embeddings
    ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
    ("qwen2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported"),
    ("qwen3", {"rope_scaling": {**LLAMA3, "rope_type": "llama3"}}, "rope type 'llama3' is not supported ("),
    ("llama", {"rope_scaling": "llama3"}, "rope_scaling is 'llama3', not an object"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters and rope_scaling are both given"),
    (
        "qwen2",
        {"rope_parameters": {"rope_theta": 1e4}},
        "rope_theta 1000000.0 is not the 10000.0 of rope_parameters",
    ),
    ("qwen2", {"rope_theta": "big"}, "rope_theta is 'big', not a number above 0"),
    *(
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", **{k: v for k, v in LLAMA3.items() if k != name}}},
            f"rope_scaling.{name} is None, and rope type 'llama3' takes a number above 0",
        )
        for name in LLAMA3
    ),
    (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
        "rope_scaling.high_freq_factor 1.0 is not above low_freq_factor",
    ),
    (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "attention_factor": 1.5}},
        "rope_scaling.attention_factor 1.5 is not supported with rope type 'llama3'",
    ),
    (
        "qwen2",
        {"rope_scaling": {"partial_rotary_factor": 0.5}},
        "rope_scaling.partial_rotary_factor 0.5 is not supported",
    ),
]


@pytest.mark.parametrize(("family", "change", "says"), REFUSED)
def test_each_refused_field_is_named(family, change, says):
    file = {k: v for k, v in {**FILES[family], **change}.items() if v is not GONE}
    with pytest.raises(ValueError) as caught:
        ModelShape.from_hf(file)
    assert str(caught.value).startswith(f"config.json: {says}")


def test_all_refused_fields_are_named_at_once():
    with pytest.raises(ValueError) as caught:
        ModelShape.from_hf({**FILES["llama"], "mlp_bias": True, "num_experts": 4, "head_dim": -1})
    assert all(name in str(caught.value) for name in ("mlp_bias", "num_experts", "head_dim"))
    assert "\n" not in str(caught.value)


# --- fields that are passed over --------------------------------------------------------------------------

ACCEPTED = {
    **{"is_llama_config": True, "unsloth_fixed": True, "internal_version": "3", "unk_token_id": 0},
    **{
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "_attn_kind": "sdpa",
        "_anything": 1,
    },
    **{"model_max_length": 4096, "temperature": 0.6, "num_beam_groups": 1, "use_flash_attention_2": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_transformers_does_not_know_either_are_passed_over(family, tmp_path):
    file = {**FILES[family], **ACCEPTED, "rope_interleaved": False, "num_experts": None}
    (tmp_path / "config.json").write_text(json.dumps(file))
    assert ModelShape.from_folder(tmp_path) == ModelShape.from_hf(FILES[family])
    (line,) = remarks(tmp_path)
    assert line.startswith(
        f"{tmp_path}/config.json: passed over, since transformers' {family} models have no"
    )
    assert line.endswith(": " + ", ".join(sorted(ACCEPTED)))
    (tmp_path / "config.json").write_text(json.dumps(FILES[family]))
    assert remarks(tmp_path) == []


def test_a_field_that_engines_may_know_has_a_warning_of_its_own(tmp_path):
    chunks = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
    file = {**FILES["qwen2"], "dual_chunk_attention_config": chunks}
    (tmp_path / "config.json").write_text(json.dumps(file))
    assert ModelShape.from_folder(tmp_path) == ModelShape.from_hf(FILES["qwen2"])
    (line,) = remarks(tmp_path)
    assert (
        "dual_chunk_attention_config is passed over: an engine may switch to another attention by it" in line
    )


def test_a_user_says_which_fields_to_ignore(tmp_path):
    file = {**FILES["llama"], "scale_depth": 1.0, "num_experts": 0, "rope_interleaved": True}
    names = ("scale_depth", "num_experts", "rope_interleaved")
    (tmp_path / "config.json").write_text(json.dumps(file))
    assert ModelShape.from_folder(tmp_path, names) == ModelShape.from_hf(FILES["llama"])
    assert remarks(tmp_path, names) == [
        f"{tmp_path}/config.json: ignored, as ignore_config_fields asks for: scale_depth = 1.0, "
        "num_experts = 0, rope_interleaved = True"
    ]
    with pytest.raises(ValueError) as caught:
        ModelShape.from_hf(file, ["rope_interleaved"])
    assert str(caught.value).endswith(
        'model.ignore_config_fields = ["scale_depth", "num_experts"] (of tools: --ignore-config-fields '
        "scale_depth num_experts) passes over what you know to change nothing"
    )


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        ({}, "scale_depth", "there is no scale_depth, which ignore_config_fields names"),
        ({}, "hidden_size", "hidden_size cannot be ignored (llama models compute with it)"),
        ({}, "rope_scaling", "rope_scaling cannot be ignored (llama models compute with it)"),
        ({"mlp_bias": True}, "mlp_bias", "mlp_bias cannot be ignored (llama models compute with it)"),
        ({"per_layer_config": {}}, "per_layer_config", "per_layer_config cannot be ignored (llama models"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config",
            "quantization_config cannot be ignored",
        ),
    ],
)
def test_what_the_model_computes_with_cannot_be_ignored(change, name, says):
    with pytest.raises(ValueError) as caught:
        ModelShape.from_hf({**FILES["llama"], **change}, [name])
    assert str(caught.value).startswith(f"config.json: {says}")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fields_of_the_class_are_those_that_transformers_has(family):
    from transformers import AutoConfig

    found = hf_fields.class_fields(family)
    assert found is not None
    written = {name for name in AutoConfig.for_model(family).to_dict() if not name.startswith("_")}
    assert written - {"model_type", "layer_types"} <= found and "rope_scaling" in found


def test_transformers_is_asked_without_being_imported_and_only_where_there_is_a_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**FILES["llama"], "unsloth_fixed": True}))
    code = (
        "import sys\nfrom pathlib import Path\nfrom megatron_dgpo.mcore import hf_config, hf_fields\n"
        f"hf_config.ModelShape.from_hf({FILES['llama']!r})\n"
        "assert hf_fields.class_fields.cache_info().currsize == 0\n"
        f"assert len(hf_config.remarks(Path({str(tmp_path)!r}))) == 1\n"
        "print([m for m in ('torch', 'transformers', 'megatron', 'numpy') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=patience(),
        cwd=ROOT,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_without_transformers_an_unknown_field_is_refused(monkeypatch):
    monkeypatch.setattr(hf_fields, "class_fields", lambda family: None)
    monkeypatch.setattr("megatron_dgpo.mcore.hf_config.class_fields", lambda family: None)
    with pytest.raises(ValueError, match="unsloth_fixed True has no counterpart") as caught:
        ModelShape.from_hf({**FILES["llama"], "unsloth_fixed": True})
    assert 'model.ignore_config_fields = ["unsloth_fixed"]' in str(caught.value)
    assert "the installed transformers, which knows more fields, could not be asked" in str(caught.value)
    file = {**FILES["llama"], "unsloth_fixed": True}
    assert ModelShape.from_hf(file, ["unsloth_fixed"]) == ModelShape.from_hf(FILES["llama"])


# --- what a checkpoint keeps ----------------------------------------------------------------------------


def test_a_checkpoint_keeps_every_field_that_gives_weights_their_meaning():
    """A new field of ModelShape has to be in one of the two."""
    follows_or_says_nothing = {"max_positions", "init_std", "qkv_bias", "qk_norm"}
    fields = {field.name for field in dataclasses.fields(ModelShape)}
    assert fields - set(IDENTITY) == follows_or_says_nothing
    assert set(IDENTITY) <= fields


def test_differences_are_named_with_both_values():
    shape = ModelShape.from_hf(FILES["llama"])
    kept = json.loads(json.dumps(shape.identity()))
    assert shape.differences(kept) == []
    other = dataclasses.replace(shape, rope_scaling=None, vocab_size=5)
    assert other.differences(kept) == [
        "vocab_size is 5 in config.json, and the weights were saved with 151936",
        f"rope_scaling is None in config.json, and the weights were saved with {kept['rope_scaling']}",
    ]
    assert other.differences({"rope_theta": 5e5}) == [], "kept by a version that knew fewer fields"
    assert other.differences({"window": 8}) == [
        "window is None in config.json, and the weights were saved with 8"
    ]
