"""Tiny model folders, configs and batches for tests that train, and several splits in one process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from patience import patience
from torch import Tensor

from megatron_dgpo import platform
from megatron_dgpo.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RunConfig,
    TrainConfig,
)
from megatron_dgpo.types import Group, Prompt, Sample

VOCAB = 45
"""Divides by neither 2 nor 4: the last rank's shard ends in padding."""


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    # The heads together are wider than the hidden state.
    "qwen3": ("Qwen3", {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    # Of the four wavelengths 6, 30, 141 and 664 one is kept, one interpolated and two are stretched.
    "llama": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 0.9,
                "high_freq_factor": 3.5,
                "original_max_position_embeddings": 32,
            }
        },
    ),
}
"""model_type -> transformers' name for its classes, and what is particular to its config."""


def write_model(
    folder: Path,
    *,
    tied: bool,
    family: str = "qwen2",
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    **shape: int,
) -> Path:
    """A model folder with transformers' random weights; biases and norms, which it would start at 0 and
    1, are random too, so that a swap of any two tensors shows. `shape`: sizes that differ from these."""
    import transformers

    name, particular = FAMILIES[family]
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    config = getattr(transformers, f"{name}Config")(
        **{**sizes, **particular, **shape},
        initializer_range=0.15,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> Path:
    """One token a character, and "<eos>" (id 0); ids up to VOCAB - 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789+-*/=,."
    ids = {"<eos>": 0, "<pad>": 1, **{c: i for i, c in enumerate(letters, 2)}}
    assert len(ids) == VOCAB
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def write_perturbed(source: Path, target: Path, *, seed: int, scale: float) -> Path:
    """A copy of a folder whose weights have moved by Gaussian noise."""
    model = hf_model(source)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=g)
    model.save_pretrained(target)
    return target


def hf_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager").eval()


def config(
    model: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    sp: bool = False,
    max_tokens: int = 4096,
    dtype: str = "float32",
    optimizer: OptimizerConfig | None = None,
    algorithm: Any = None,
    temperature: float = 1.0,
    reference: str = "auto",
) -> Config:
    """A run on a tiny model; what it does not name is the default."""
    more = {} if algorithm is None else {"algorithm": algorithm}
    return Config(
        run=RunConfig(folder=model / "run"),
        model=ModelConfig(path=model, params_dtype=dtype, reference_placement=reference),  # type: ignore[arg-type]
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            sequence_parallel=sp,
            timeout_seconds=patience(),
        ),
        data=DataConfig(train=(model / "unused",)),
        reward=RewardConfig(name="exact_match"),
        rollout={"temperature": temperature},  # type: ignore[arg-type]
        train=TrainConfig(
            steps=1,
            prompts_per_step=4,
            samples_per_prompt=3,
            prompts_per_minibatch=4,
            max_tokens_per_microbatch=max_tokens,
        ),
        optimizer=optimizer or OptimizerConfig(lr=1e-2),
        **more,
    )


SPLITS: dict[str, dict[str, Any]] = {
    "DP=2": {},
    "TP=2": {"tp": 2},
    "TP=2 SP": {"tp": 2, "sp": True},
    "PP=2": {"pp": 2},
}
"""Of two ranks."""


@contextmanager
def split(c: Any) -> Iterator[platform.Groups]:
    """Groups of a config's split over the ranks that are there; may be entered again and again."""
    from megatron.core import parallel_state

    groups = platform.start(c.parallel, seed=1)
    try:
        yield groups
    finally:
        parallel_state.destroy_model_parallel()
    _end_groups()


def _end_groups() -> None:
    """End every process group but the world: gloo has threads for each, which wake a hundred times a second,
    and after some dozens of splits ranks would do nothing else."""
    dist.barrier()  # nobody is in one of them
    for group in [g for g in dist.distributed_c10d._world.pg_map if g is not dist.group.WORLD]:
        dist.destroy_process_group(group)


def sequences(seed: int = 5, count: int = 9) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt ids, response ids) of different lengths, from one token each."""
    g = random.Random(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(g.randrange(VOCAB) for _ in range(n))

    return [(ids(1), ids(1))] + [(ids(g.randint(2, 9)), ids(g.randint(1, 14))) for _ in range(count - 1)]


def scored_groups(seed: int = 7, prompts: int = 4, n: int = 3) -> list[Group]:
    """Groups of samples with rewards; one reward failed, and no advantage is set yet."""
    g = random.Random(seed)
    groups = []
    for p, (prompt_ids, _) in enumerate(sequences(seed, prompts)):
        prompt = Prompt(f"p{p}", prompt_ids, "", "")
        samples = []
        for i in range(n):
            ids = [g.randrange(VOCAB) for _ in range(1 if p == i == 0 else g.randint(2, 16))]
            log_probs = [-g.uniform(1.0, 5.0) for _ in ids]
            samples.append(Sample(prompt, i, ids, log_probs, "stop", (), reward=g.choice((0.0, 0.3, 1.0))))
        samples[0].reward, samples[1].reward = 1.0, 0.0  # no group is all alike
        groups.append(Group(prompt, samples))
    groups[1].samples[2].reward = None
    return groups


def hf_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors, read without the product."""
    from safetensors.torch import load_file

    out: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not set(part) & set(out), f"{folder}: a tensor is in two files"
        out |= part
    return out
