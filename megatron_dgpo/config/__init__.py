"""Every knob of a run: typed, documented, checked before anything is built.

`Config` is a reinforcement run (megatron_dgpo.train), `SFTConfig` a supervised one
(megatron_dgpo.sft). How files and command lines become one of them is in `megatron_dgpo.cli`.
Needs only pydantic. The algorithms' settings are in `config.algorithms`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatron_dgpo.config.algorithms import AlgorithmConfig, DGPOConfig
from megatron_dgpo.config.section import Count, NonNegative, Positive, PositiveInt, Probability, Section

# A path comes from TOML as a string; everything else keeps its type.
Folder = Annotated[Path, Field(strict=False)]
Source = Annotated[str, BeforeValidator(lambda given: str(given) if isinstance(given, Path) else given)]

Sources = Annotated[tuple[Source, ...], Field(strict=False)]


def _id_or_text(given: Any) -> Any:
    if type(given) not in (int, str):
        raise ValueError("neither a token id nor the text of one token")
    return given


StopTokens = Annotated[tuple[Annotated[int | str, BeforeValidator(_id_or_text)], ...], Field(strict=False)]


class RunConfig(Section):
    folder: Folder = Path("runs/default")
    """Where everything of the run goes."""
    seed: Count = 1
    """Of the data order, the sampling and random start weights."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder; start when there is none."""
    quiet: bool = False
    """Print results and advisories only."""


class ModelConfig(Section):
    path: Folder
    """A Hugging Face folder: config.json, tokenizer, and safetensors unless init is "random"."""
    init: Literal["weights", "random"] = "weights"
    """Start from the folder's weights, or from random ones."""
    ignore_config_fields: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Fields of config.json that are unknown here and, as you know, do not change what the model computes."""
    params_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters that compute; the optimizer keeps float32 copies."""
    layer_spec: Literal["auto", "torch", "transformer_engine"] = "auto"
    """Transformer layers; "auto" takes Transformer Engine's for bfloat16 where it is installed and there is
    a GPU. A run logs its choice and the reason."""
    transformer: dict[str, Any] = {}
    """Fields of Megatron's TransformerConfig by name, such as attention_backend = "flash"."""
    reference_placement: Literal["auto", "device", "host"] = "auto"
    """Where the reference's weights stay: beside the policy's, or in host memory, from where they take the
    place of the policy's for a pass. "auto": beside it on a CPU, and on a GPU of whose memory they take a
    sixteenth at most."""


class ParallelConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What the ranks compute on: a GPU each, or the CPU over gloo; "auto" takes GPUs where there are any.
    With "cpu" the servers that a run starts compute on the CPU too."""
    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share each layer and the vocabulary."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that the layers are split into."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share each sequence; only 1 is supported so far."""
    sequence_parallel: bool = False
    """Split norms and residuals by tokens over the tensor-parallel ranks."""
    timeout_seconds: PositiveInt = 600
    """How long a collective waits for a rank before the run ends with an error."""


class DataConfig(Section):
    train: Sources
    """Prompts with gold answers: jsonl or parquet files, or hub://owner/name[/config][?split=train]."""
    prompt_key: str = "prompt"
    """Column of the prompt: a string or chat messages. Dots reach into nested columns."""
    answer_key: str = "answer"
    """Column of the gold answer; rows in DAPO-Math-17k's layout are recognised without it."""
    apply_chat_template: bool = True
    """Put the prompt through the tokenizer's chat template."""
    system_prompt: str = ""
    """Put before every prompt, as a system message."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are left out, and counted in the log."""
    shuffle: bool = True
    """A new order each epoch."""


class SFTDataConfig(Section):
    train: Sources
    """Prompts with responses: jsonl or parquet files, or hub://owner/name[/config][?split=train]."""
    prompt_key: str = "prompt"
    """Column of the prompt."""
    response_key: str = "response"
    """Column of the response to learn."""
    apply_chat_template: bool = True
    """Put the prompt through the tokenizer's chat template."""
    system_prompt: str = ""
    """Put before every prompt, as a system message."""
    max_tokens: PositiveInt = 2048
    """Longer rows are left out, and counted in the log."""


class GenerationConfig(Section):
    max_new_tokens: PositiveInt = 1024
    """A response that has not ended by then is truncated."""
    stop_tokens: StopTokens = ()
    """What ends a response beside the end-of-sequence tokens of the tokenizer, generation_config.json and
    config.json: token ids, or texts of one token each, such as ["<|im_end|>", 151643]."""
    max_batch_size: PositiveInt = 256
    """Samples that a rank generates together in the embedded engine."""


RESERVED_POSITIONS = 6
"""Of its context, SGLang keeps one to itself and takes prompts that leave five more; a response that is
continued is part of a prompt."""


class LaunchConfig(Section):
    """Servers that the run starts on each machine of torchrun's, and ends."""

    count: PositiveInt = 1
    """How many servers on each machine."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs of each server."""
    devices: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    """Numbers of the GPUs, tensor_parallel_size for each server in turn; none: those after the ranks' own.
    With CUDA_VISIBLE_DEVICES they count in its list, as the ranks' do."""
    python: Folder = Path(".venv-sglang/bin/python")
    """Interpreter of the environment that SGLang is installed in (without a GPU: `make sglang`)."""
    args: dict[str, Any] = {}
    """More arguments of sglang.launch_server by name, such as mem_fraction_static = 0.8."""
    startup_timeout_seconds: PositiveInt = 540
    """How long the servers may take, side by side, until they answer."""
    max_restarts: Count = 3
    """How many times servers that died are started again, on each machine over the whole run."""


class SGLangConfig(Section):
    urls: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Addresses of servers that run already; none, and no router: the run starts its own."""
    router: str = ""
    """An sglang-router in front of servers that run already; weights go to its workers directly."""
    launch: LaunchConfig = LaunchConfig()
    """Servers that the run starts."""
    max_concurrent_requests: PositiveInt = 256
    """Samples in flight at a server, from all ranks together."""
    request_timeout_seconds: NonNegative = 0.0
    """A sample that takes longer is drawn again, once: at most half of parallel.timeout_seconds, for which
    the other ranks wait. 0: a minute, and the most tokens of a response at min_tokens_per_second."""
    min_tokens_per_second: Positive = 10.0
    """Of one sample, at the least, the wait for its turn at the server included."""
    retries: Count = 3
    """How many times a request that failed is sent to a server again, with growing pauses, until the server
    counts as dead."""
    colocate: bool = False
    """The servers share the trainer's GPUs: they give up their memory while it trains, and weights go
    through shared memory (CUDA IPC) instead of a broadcast."""
    address: str = "127.0.0.1"
    """Where servers reach the trainer's broadcasts, and the run's own servers on several machines listen;
    "hostname": the name of each machine. With such servers the default is replaced by the address with which
    each machine reaches torchrun's MASTER_ADDR."""

    def sample_timeout(self, max_new_tokens: int) -> float:
        """Seconds that a sample of so many tokens may take."""
        return self.request_timeout_seconds or 60.0 + max_new_tokens / self.min_tokens_per_second

    @property
    def managed(self) -> bool:
        """Whether the run starts the servers, and ends them."""
        return not (self.urls or self.router)


class RolloutConfig(GenerationConfig):
    engine: Literal["embedded", "sglang"] = "embedded"
    """embedded: transformers' model in the training processes. sglang: SGLang servers."""
    sglang: SGLangConfig = SGLangConfig()
    """Of the engine of that name."""
    temperature: Positive = 1.0
    """Of the sampling; the trained policy is the one at this temperature."""
    top_p: Probability = 1.0
    """Nucleus mass; 1 keeps everything."""
    top_k: Count = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Drop tokens below this share of the likeliest one's probability."""
    dynamic_sampling: bool = False
    """Draw prompts until the step has enough groups whose rewards differ; the others teach nothing."""
    max_rounds: PositiveInt = 10
    """Draws of prompts for one step, at most; if that does not fill it, the run ends with an error."""
    oversampling: Annotated[float, Field(ge=1)] = 1.0
    """Draw this many times train.prompts_per_step prompts; the slowest are given up when enough are done."""


class SyncConfig(Section):
    bucket_bytes: PositiveInt = 256 << 20
    """Weights travel to the engines in pieces of about this size."""
    in_flight: Literal["retract", "abort"] = "retract"
    """Samples that are being drawn while weights change: go on under the new ones, or start again."""
    probe_every: Count = 1
    """Compare engine and trainer on the run's prompts and responses after the sync of every so many steps; 0
    never does."""
    max_log_prob_gap: NonNegative = 0.0
    """Mean difference in nats at which the probe ends the run; 0: 1e-3 in float32, 0.2 in bfloat16."""
    timeout_seconds: PositiveInt = 300
    """How long a sync may wait for a server before the server counts as dead."""


class ScoringConfig(Section):
    name: str
    """A registered reward (hash_answer, math_verify, exact_match, multiple_choice), or
    "package.module:function" of your own."""
    timeout_seconds: Positive = 10.0
    """A response that takes longer to score has failed, which is not the same as wrong (math_verify,
    yours)."""
    num_workers: PositiveInt = 1
    """Scoring processes a rank (math_verify, yours)."""


class FormatTerm(Section):
    name: Literal["format"]
    """Adds the weight where the text matches."""
    weight: float = 0.1
    """What a match is worth."""
    pattern: str
    """A regular expression, searched for in the response."""


class LengthTerm(Section):
    name: Literal["length"]
    """Takes off up to the weight for long responses."""
    weight: float = 0.1
    """What the longest lose."""
    free_tokens: Count
    """Responses of up to so many tokens lose nothing."""
    max_tokens: PositiveInt
    """Those of so many lose the whole weight; in between a straight line."""


class OverlongTerm(Section):
    name: Literal["overlong"]
    """DAPO's soft overlong punishment (Eq. 13, arXiv 2503.14476)."""
    weight: float = 1.0
    """What a response that is cut at rollout.max_new_tokens loses."""
    buffer_tokens: Count = 0
    """The punishment begins so many tokens before; 0: a fifth of rollout.max_new_tokens."""


RewardTerm = Annotated[FormatTerm | LengthTerm | OverlongTerm, Field(discriminator="name")]


class RewardConfig(ScoringConfig):
    terms: Annotated[tuple[RewardTerm, ...], Field(strict=False)] = ()
    """Tables {name = "format" | "length" | "overlong", weight, ...} that are added to the reward for the
    answer; evaluations leave them out."""
    shuffle: bool = False
    """Negative control: deal the rewards of a step to its samples at random."""


class TrainConfig(Section):
    steps: PositiveInt
    """Rollout batches."""
    prompts_per_step: PositiveInt
    """Prompts of a rollout batch, over all ranks."""
    samples_per_prompt: Annotated[int, Field(ge=2)]
    """G: responses to each prompt; the group's statistics need two."""
    prompts_per_minibatch: PositiveInt
    """Prompts of one optimizer step, over all ranks."""
    epochs_per_rollout: PositiveInt = 1
    """Passes over the rollout batch."""
    max_tokens_per_microbatch: PositiveInt = 8192
    """Token budget of one forward and backward pass on one replica."""
    share_prompts: bool = True
    """Compute a prompt once for the responses to it in a micro-batch, where that saves an eighth of their
    tokens (never with Transformer Engine's fused rotary embedding)."""
    async_steps: Literal[0, 1] = 0
    """1: draw the samples of the next step while this one trains. Their weights are a version behind."""


class SFTTrainConfig(Section):
    steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt
    """Sequences of an optimizer step, over all ranks."""
    max_tokens_per_microbatch: PositiveInt = 8192
    """Token budget of one forward and backward pass on one replica."""


class OptimizerConfig(Section):
    lr: Positive
    """Highest learning rate."""
    min_lr: NonNegative = 0.0
    """Where the decay ends."""
    warmup_steps: Count = 0
    """Optimizer steps of linear warm-up: step k of n has the learning rate lr k / n."""
    decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Of the learning rate after the warm-up, over the rest of the run."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of AdamW."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Of AdamW."""
    adam_eps: Positive = 1e-8
    """Of AdamW."""
    weight_decay: NonNegative = 0.1
    """Decoupled; not applied to biases and norms."""
    clip_grad: NonNegative = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    megatron: dict[str, Any] = {}
    """Fields of Megatron's OptimizerConfig by name."""


class CheckpointConfig(Section):
    every: Count = 20
    """Steps between checkpoints; 0 writes one at the end only."""
    keep_last: Count = 2
    """How many of the newest to keep; 0 keeps all."""
    keep_best: bool = True
    """Keep the one with the best held-out avg@k too."""
    timeout_seconds: PositiveInt = 1800
    """How long a rank may take to write its part of a checkpoint before it ends with an error."""
    export_hf: bool = True
    """Write the final policy as a Hugging Face folder."""


class HeldoutConfig(Section):
    data: Sources = ()
    """Held-out prompts, as data.train's; none turns evaluation off."""
    prompt_key: str = "prompt"
    """Column of the prompt."""
    answer_key: str = "answer"
    """Column of the gold answer."""
    k: PositiveInt = 8
    """Samples a problem."""
    temperature: Positive = 1.0
    """Of the samples."""
    top_p: Probability = 1.0
    """Of the samples."""
    greedy: bool = True
    """Also report the accuracy of greedy decoding."""
    max_problems: Count = 0
    """Use the first so many problems; 0 uses all."""


class EvaluationConfig(HeldoutConfig):
    every: Count = 20
    """Steps between evaluations; 0 evaluates at the start and the end only."""


class SinksConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    wandb_project: str = ""
    """Send metrics to this project on Weights & Biases too (needs the package wandb; its own environment
    variables, such as WANDB_MODE, apply); empty sends nothing."""


class ObserveConfig(SinksConfig):
    samples_per_step: Count = 8
    """Responses of each step that are kept to read, in whole groups."""
    credit_every: Count = 10
    """Steps between recordings of the credit of single tokens (RUN/credit), the first and the last step
    included; 0 never records."""
    credit_samples: PositiveInt = 16
    """Responses of a recorded step, over all replicas, in whole groups (at least one) chosen at random."""
    credit_max_bytes: PositiveInt = 1 << 30
    """Bound of RUN/credit: beyond it, every second recorded step is removed; the first and newest stay."""


class Config(Section):
    """A reinforcement-learning run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    sync: SyncConfig = SyncConfig()
    reward: RewardConfig
    algorithm: AlgorithmConfig = DGPOConfig()
    train: TrainConfig
    optimizer: OptimizerConfig
    ddp: dict[str, Any] = {}
    """Fields of Megatron's DistributedDataParallelConfig by name."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    observe: ObserveConfig = ObserveConfig()

    @property
    def prompts_per_draw(self) -> int:
        """Prompts of a draw, over all ranks."""
        # 10 * 1.1 is a little above 11 in binary.
        return math.ceil(round(self.train.prompts_per_step * self.rollout.oversampling, 6))


class SFTCheckpointConfig(CheckpointConfig):
    every: Count = 0
    """Steps between checkpoints; 0 writes one at the end only."""


class SFTRewardConfig(ScoringConfig):
    name: str = "exact_match"
    """See RewardConfig."""


class SFTObserveConfig(SinksConfig):
    every: PositiveInt = 10
    """Optimizer steps between lines of metrics."""


class SFTConfig(Section):
    """A supervised run; rollout and reward serve its evaluation."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: SFTDataConfig
    train: SFTTrainConfig
    optimizer: OptimizerConfig
    ddp: dict[str, Any] = {}
    """Fields of Megatron's DistributedDataParallelConfig by name."""
    checkpoint: SFTCheckpointConfig = SFTCheckpointConfig()
    rollout: GenerationConfig = GenerationConfig()
    reward: SFTRewardConfig = SFTRewardConfig()
    evaluation: HeldoutConfig = HeldoutConfig()
    observe: SFTObserveConfig = SFTObserveConfig()
