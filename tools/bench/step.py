"""Times one whole update of DGPO against GRPO with a reference (k3 KL) and against GRPO without one.

    python tools/bench/step.py [--rounds 9]
    torchrun --standalone --nproc-per-node 2 tools/bench/step.py --tensor-model-parallel-size 2

An update is everything that happens to a rollout batch after its rewards are known: packing, the
reference's pass, the pass for old log-probs (and credit), and one optimizer step, on one model of random
weights and one batch of random responses. The algorithms take turns in every round, each round in another
order, and a ratio is between two updates of the same round, so slow drifts of the machine cancel.

Printed: medians over the rounds, and each algorithm's time over that of GRPO with KL as the median of the
ratios with the quarter and three-quarter points.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen2Config

from megatron_dgpo import platform
from megatron_dgpo.algorithms import build_algorithm
from megatron_dgpo.cli import validate
from megatron_dgpo.config import Config
from megatron_dgpo.config.algorithms import DGPOConfig, GRPOConfig
from megatron_dgpo.learner import Learner
from megatron_dgpo.mcore.policy import Policy
from megatron_dgpo.observe.machine import describe_machine
from megatron_dgpo.run import build_policy
from megatron_dgpo.types import Prompt, Sample

BASE = "grpo, k3 KL"
ALGORITHMS: dict[str, Any] = {
    BASE: GRPOConfig(kl_coef=0.04),
    "grpo": GRPOConfig(),
    "dgpo, credit at rollout": DGPOConfig(credit_timing="rollout"),
    "dgpo, credit at update": DGPOConfig(credit_timing="update"),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    on_gpu = torch.cuda.is_available()
    # Qwen2.5-0.5B's width, head and MLP; on a CPU few of its layers and a fifth of its vocabulary.
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--layers", type=int, default=24 if on_gpu else 6)
    parser.add_argument("--vocab", type=int, default=151936 if on_gpu else 32768)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16" if on_gpu else "float32"
    )
    parser.add_argument("--sequences", type=int, default=64 if on_gpu else 8)
    parser.add_argument("--prompt-tokens", type=int, default=128 if on_gpu else 16)
    parser.add_argument("--response-tokens", type=int, default=1024 if on_gpu else 112)
    parser.add_argument(
        "--spread",
        type=float,
        default=0.0,
        help="of the responses' lengths around --response-tokens: sigma of a log-normal (0: all equal)",
    )
    parser.add_argument("--max-tokens", type=int, default=16384 if on_gpu else 1024, help="of a micro-batch")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/step.json"))
    return parser.parse_args()


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """The folder's config.json; weights are random."""
    Qwen2Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 38 // 7,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=2,
        max_position_embeddings=args.prompt_tokens + longest(args),
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)


def make_config(folder: Path, args: argparse.Namespace) -> Config:
    raw = {
        "run": {"folder": folder / "run"},
        "model": {"path": folder, "init": "random", "params_dtype": args.dtype},
        "parallel": {"tensor_model_parallel_size": args.tensor_model_parallel_size},
        "data": {"train": [folder / "unused"]},
        "reward": {"name": "exact_match"},
        "train": {
            "steps": 1,
            "prompts_per_step": args.sequences // 2,
            "samples_per_prompt": 2,
            "prompts_per_minibatch": args.sequences // 2,
            "max_tokens_per_microbatch": args.max_tokens,
        },
        # Small, so that the policy stays what it is, but not 0: the reference is another policy.
        "optimizer": {"lr": 1e-5},
    }
    return validate(raw, Config)


def longest(args: argparse.Namespace) -> int:
    """Of the responses: two standard deviations above the median."""
    return round(args.response_tokens * math.exp(2 * args.spread))


def make_samples(args: argparse.Namespace, replica: int) -> list[Sample]:
    """Scored responses of random tokens; each replica has its own."""
    g = torch.Generator().manual_seed(replica)
    spread = (args.spread * torch.randn(args.sequences, generator=g)).exp()
    lengths = (args.response_tokens * spread).round().long().clamp(1, longest(args)).tolist()

    def ids(count: int) -> list[int]:
        return torch.randint(0, args.vocab, (count,), generator=g).tolist()

    samples = []
    for i in range(args.sequences):
        prompt = Prompt(str(i), tuple(ids(args.prompt_tokens)), "", "")
        response = ids(lengths[i])
        sample = Sample(prompt, 0, response, [-10.0] * len(response), "stop", (), reward=float(i % 2))
        sample.advantage = 1.0 if i % 2 else -1.0
        samples.append(sample)
    return samples


def timed_update(learner: Learner, samples: list[Sample]) -> dict[str, float]:
    """Seconds of the batch's statistics and of the optimizer step, on the slowest rank."""

    def now() -> float:
        if platform.has_gpu():
            torch.cuda.synchronize()
        return time.perf_counter()

    dist.barrier()
    start = now()
    (minibatch,) = learner.pack([samples])
    learner.prepare([minibatch])
    middle = now()
    learner.update(minibatch, save_bad_batch_to=Path(tempfile.gettempdir()))
    spent = torch.tensor([middle - start, now() - middle], dtype=torch.float64)
    spent = spent.to(learner.policy.groups.device)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    prepare, update = spent.tolist()
    return {"prepare": prepare, "update": update, "total": prepare + update}


def build_learners(policy: Policy, args: argparse.Namespace) -> dict[str, Learner]:
    return {
        name: Learner(
            policy,
            build_algorithm(config, vocab_size=args.vocab),
            temperature=1.0,
            max_tokens=args.max_tokens,
        )
        for name, config in ALGORITHMS.items()
    }


def take_turns(
    learners: dict[str, Learner], samples: list[Sample], rounds: int
) -> dict[str, list[dict[str, float]]]:
    names = list(learners)
    for name in names:  # warm-up
        timed_update(learners[name], samples)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(timed_update(learners[name], samples))
        if dist.get_rank() == 0:
            print(f"round {i + 1}/{rounds}", flush=True)
    return times


def summary(times: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    base = [t["total"] for t in times[BASE]]
    rows = {}
    for name, runs in times.items():
        ratios = [run["total"] / b for run, b in zip(runs, base, strict=True)]
        row: dict[str, Any] = {k: statistics.median(run[k] for run in runs) for k in runs[0]}
        row["ratio"] = statistics.median(ratios)
        row["quartiles"] = statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2
        rows[name] = row
    return rows


def peak_bytes() -> int:
    """Of the process; of the GPU where there is one."""
    if platform.has_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(rows: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    machine = describe_machine()
    shape = {k: v for k, v in vars(args).items() if k != "json"} | {"world_size": dist.get_world_size()}
    print(json.dumps(machine), json.dumps(shape), sep="\n")
    print(f"peak memory of rank 0: {peak_bytes() / 1e9:.2f} GB")
    print(f"{'':26s}{'prepare s':>11s}{'update s':>11s}{'total s':>11s}   over {BASE} (quartiles)")
    for name, row in rows.items():
        low, high = row["quartiles"]
        times = "".join(f"{row[k]:11.3f}" for k in ("prepare", "update", "total"))
        print(f"{name:26s}{times}   {row['ratio']:.3f} ({low:.3f} to {high:.3f})")
    lines = [(name, f"{row['total']:.3f} s, {row['ratio']:.3f} times {BASE}") for name, row in rows.items()]
    out = {"machine": machine, "shape": shape, "rows": rows, "summary": lines}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(out, indent=1) + "\n")
    print(f"written to {args.json}")


def main() -> None:
    args = parse_arguments()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder, args)
        config = make_config(folder, args)
        with platform.distributed(config.parallel, seed=1) as groups:
            updates = len(ALGORITHMS) * (args.rounds + 1)
            policy = build_policy(config, groups, total_updates=updates, keep_reference=True)
            samples = make_samples(args, groups.dp.rank())
            rows = summary(take_turns(build_learners(policy, args), samples, args.rounds))
            if groups.rank == 0:
                report(rows, args)


if __name__ == "__main__":
    main()
