"""Time and peak memory of the token statistics, forward and backward, against what they replace.

    python tools/bench/token_stats.py [--tokens 4096 --hidden 1024 --vocab 151936 --dtype float32]

The loss is a weighted sum of log-probs; gradients go to hidden states and LM-head weight. Rows:

    ours            linear_token_stats with a reference; on a GPU fused and eager
    ours, no ref    the same without a reference, to set beside Megatron's cross entropy
    full logits     (a) logits of policy and reference in float32, torch's log_softmax, plain formulas
    megatron        (b) Megatron's vocab-parallel cross entropy and a separate entropy, log-probs only
                    (where megatron.core is installed)
    no ref, 1 pass  the same with gradients made in the forward pass, which spares the product that the
                    backward pass repeats: possible where coefficients are known beforehand, on one rank
    floor           (c) the five matrix products alone, in chunks: two forward, one again, two backward

Each row runs in processes of its own: a warm-up on few tokens, then the fastest of --repeats. Peak extra
memory is the peak of one forward and backward over what was there before it (inputs), less the gradients
that it returns. On a GPU that is torch's allocator's peak. On a CPU it is the kernel's high-water mark of
resident memory (VmHWM, set back before the run through /proc/self/clear_refs), so it counts the matrix
library's buffers too; it is read in a process of its own in which the C library returns freed blocks at
once (MALLOC_MMAP_THRESHOLD_), which would cost time in the others.

On a GPU two more tables follow: the logits-level kernels against a device-to-device copy, and the LM-head
form against a plain matrix product of the same shape. Their sizes and the defaults change where CUDA is
available: H = 5120, V = 152064 and K = V / 8 and V, bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_dgpo.observe.machine import describe_machine
from megatron_dgpo.ops import default_chunk_size, linear_token_stats, load_kernels, token_stats
from megatron_dgpo.ops.driver import Incoming, Plan, add_matmul_wide, matmul_wide
from megatron_dgpo.ops.shards import merge_shards

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Tensors = dict[str, torch.Tensor]
Gradients = tuple[torch.Tensor, ...]


def make_inputs(args: argparse.Namespace, device: str) -> Tensors:
    g = torch.Generator(device=device).manual_seed(0)
    dtype = DTYPES[args.dtype]

    def normal(rows: int, scale: float) -> torch.Tensor:
        out = torch.empty(rows, args.hidden, device=device, dtype=dtype)
        return out.normal_(generator=g).mul_(scale)

    spread = 3.0 / args.hidden**0.5
    hidden, weight = normal(args.tokens, 1.0), normal(args.vocab, spread)
    out = {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}
    if args.variant in ("eager", "fused", "full", "floor"):
        out["reference_hidden"], out["reference_weight"] = (
            normal(args.tokens, 1.0),
            normal(args.vocab, spread),
        )
    out["targets"] = torch.randint(0, args.vocab, (args.tokens,), generator=g, device=device)
    out["coefficients"] = torch.randn(args.tokens, generator=g, device=device)
    return out


def gradients(log_probs: torch.Tensor, x: Tensors) -> Gradients:
    return torch.autograd.grad((log_probs * x["coefficients"]).sum(), (x["hidden"], x["weight"]))


def ours(impl: str, with_reference: bool, chunk_size: int | None) -> Callable[[Tensors], Gradients]:
    def step(x: Tensors) -> Gradients:
        pair = (
            {"reference_hidden": x["reference_hidden"], "reference_weight": x["reference_weight"]}
            if with_reference
            else {}
        )
        stats = linear_token_stats(
            x["hidden"], x["weight"], x["targets"], chunk_size=chunk_size, impl=impl, **pair
        )
        return gradients(stats.log_probs, x)

    return step


def one_pass(chunk_size: int) -> Callable[[Tensors], Gradients]:
    """Gradients in the forward pass. With more ranks each chunk would need a collective of its own."""

    @torch.no_grad()
    def step(x: Tensors) -> Gradients:
        hidden, weight = x["hidden"], x["weight"]
        kernels = load_kernels("fused" if hidden.is_cuda else "eager")
        plan = Plan(None, 0, weight.shape[0], 1.0, chunk_size, False)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk_size):
            part = slice(start, start + chunk_size)
            targets = x["targets"][part]
            logits = matmul_wide(hidden[part], weight.t())
            merged = merge_shards(kernels.reduce(logits, targets, None, plan, False).unsqueeze(0))
            incoming = Incoming(
                targets, merged.peak, merged.log_partition, merged.entropy, x["coefficients"][part], None
            )
            dz = kernels.into_gradient(logits, hidden.dtype, incoming, plan)
            grad_hidden[part] = matmul_wide(dz, weight)
            add_matmul_wide(grad_weight, dz.t(), hidden[part])
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)

    return step


def full_logits(x: Tensors) -> Gradients:
    """What is written where memory is no concern; float32 logits, as an exact distance needs."""
    log_p = torch.log_softmax((x["hidden"] @ x["weight"].t()).float(), -1)
    with torch.no_grad():
        log_q = torch.log_softmax((x["reference_hidden"] @ x["reference_weight"].t()).float(), -1)
        p, q = log_p.exp(), log_q.exp()
        entropy = -(p * log_p).sum(-1)
        hellinger = 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1)
        reverse_kl = (p * (log_p - log_q)).sum(-1)
        reference = log_q.gather(1, x["targets"][:, None])
        del log_q, p, q
    assert all(s.shape[0] == log_p.shape[0] for s in (entropy, hellinger, reverse_kl, reference))
    return gradients(log_p.gather(1, x["targets"][:, None])[:, 0], x)


def megatron(x: Tensors) -> Gradients:
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("nccl" if x["hidden"].is_cuda else "gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    logits = x["hidden"] @ x["weight"].t()
    with torch.no_grad():
        p = torch.softmax(logits.float(), -1)
        entropy = -torch.xlogy(p, p).sum(-1)
        del p
    assert entropy.shape == x["targets"].shape
    # It works in place on float32 logits, which nothing needs afterwards here.
    loss = vocab_parallel_cross_entropy(logits[:, None], x["targets"][:, None])
    return gradients(-loss[:, 0], x)


def floor(chunk_size: int) -> Callable[[Tensors], Gradients]:
    """The products of our chunked form, on operands of the right shape."""

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else a @ b

    @torch.no_grad()
    def step(x: Tensors) -> Gradients:
        weight, grad_weight = x["weight"], torch.zeros_like(x["weight"], dtype=torch.float32)
        grad_hidden = torch.empty_like(x["hidden"], dtype=torch.float32)
        for start in range(0, x["hidden"].shape[0], chunk_size):
            part = slice(start, start + chunk_size)
            hidden = x["hidden"][part]
            product(x["reference_hidden"][part], x["reference_weight"].t())
            product(hidden, weight.t())
            dz = product(hidden, weight.t()).to(hidden.dtype)
            grad_hidden[part] = product(dz, weight)
            if hidden.is_cuda and hidden.dtype != torch.float32:
                torch.addmm(grad_weight, dz.t(), hidden, out_dtype=torch.float32, out=grad_weight)
            else:
                grad_weight.addmm_(dz.t().to(grad_weight.dtype), hidden.to(grad_weight.dtype))
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)

    return step


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise KeyError(f"/proc/self/status has no {field}: peak memory on a CPU is measured on Linux only")


def measured(step: Callable[[], Gradients], on_gpu: bool) -> tuple[float, float]:
    """(seconds, peak extra MiB) of one call that has run before."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    start = time.perf_counter()
    out = step()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")
    returned = sum(t.numel() * t.element_size() for t in out)
    return seconds, (peak - before - returned) / 2**20


def child(args: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()
    x = make_inputs(args, "cuda" if on_gpu else "cpu")
    chunk = args.chunk_size or default_chunk_size(args.vocab, "cuda" if on_gpu else "cpu")
    steps: dict[str, Callable[[Tensors], Gradients]] = {
        "eager": ours("eager", True, args.chunk_size),
        "fused": ours("fused", True, args.chunk_size),
        "alone": ours("auto", False, args.chunk_size),
        "one_pass": one_pass(chunk),
        "full": full_logits,
        "megatron": megatron,
        "floor": floor(chunk),
    }
    step = steps[args.variant]
    # Threads, libraries and compiled kernels are made here, on few tokens.
    few = {k: v.detach()[:64] if v.shape[0] == args.tokens else v for k, v in x.items()}
    few["hidden"].requires_grad_()
    step(few)
    runs = [measured(lambda: step(x), on_gpu) for _ in range(args.repeats)]
    print(json.dumps({"seconds": min(r[0] for r in runs), "peak_extra_mib": max(r[1] for r in runs)}))


def run_child(variant: str, args: argparse.Namespace, repeats: int, **environment: str) -> dict[str, Any]:
    words = [f"--{k}={getattr(args, k)}" for k in ("tokens", "hidden", "vocab", "dtype")]
    words.append(f"--repeats={repeats}")
    if args.chunk_size:
        words.append(f"--chunk-size={args.chunk_size}")
    command = [sys.executable, __file__, "--variant", variant, *words]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=args.timeout
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"error": last}
    return json.loads(done.stdout.splitlines()[-1])


def cuda_seconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median device time."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device-to-device copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / cuda_seconds(lambda: target.copy_(source))


def logits_bandwidth(tokens: int, width: int) -> dict[str, Any]:
    """Share of the copy bandwidth of the logits-level form, by the bytes that one pass has to move."""
    copy_rate = copy_bandwidth()
    z = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    reference = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, width, (tokens,), device="cuda")

    def forward() -> torch.Tensor:
        return token_stats(z, targets, reference_logits=reference, impl="fused").log_probs

    log_probs, ones = forward(), torch.ones(tokens, device="cuda")
    moved = 2 * z.numel() * z.element_size()  # forward: two tensors read; backward: one read, one written
    rates = {
        "forward": moved / cuda_seconds(forward),
        "backward": moved / cuda_seconds(lambda: torch.autograd.grad(log_probs, z, ones, retain_graph=True)),
    }
    return {
        "tokens": tokens,
        "width": width,
        "copy_gb_s": copy_rate / 1e9,
        **{f"{k}_gb_s": v / 1e9 for k, v in rates.items()},
        **{f"{k}_share": v / copy_rate for k, v in rates.items()},
    }


def matrix_share(args: argparse.Namespace, width: int) -> dict[str, Any]:
    """Share of a plain product's rate that the LM-head form keeps, over its five products."""
    local = argparse.Namespace(**{**vars(args), "vocab": width, "variant": "fused"})
    x = make_inputs(local, "cuda")
    hidden, weight = x["hidden"].detach(), x["weight"].detach()
    flops = 2 * args.tokens * args.hidden * width
    rate = flops / cuda_seconds(lambda: hidden @ weight.t(), 10)
    own = 5 * flops / cuda_seconds(lambda: ours("fused", True, args.chunk_size)(x), 5)
    return {"width": width, "matmul_tflop_s": rate / 1e12, "fused_tflop_s": own / 1e12, "share": own / rate}


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=5120 if on_gpu else 1024)
    parser.add_argument("--vocab", type=int, default=152064 if on_gpu else 151936)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--chunk-size", type=int, help="tokens a chunk (default: as the product chooses)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one row")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/token_stats.json"))
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_rows(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    names = {"eager": "ours"}
    if torch.cuda.is_available():
        names = {"fused": "ours, fused", "eager": "ours, eager"}
    names |= {"alone": "ours, no ref", "one_pass": "no ref, 1 pass", "full": "full logits"}
    if importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core"):
        names["megatron"] = "megatron"
    names["floor"] = "floor"
    rows: dict[str, dict[str, Any]] = {}
    for variant, name in names.items():
        row = rows[name] = run_child(variant, args, args.repeats)
        if "error" not in row and not torch.cuda.is_available():
            row["peak_extra_mib"] = None
            row |= {
                k: v
                for k, v in run_child(variant, args, 1, MALLOC_MMAP_THRESHOLD_="65536").items()
                if k != "seconds"
            }
        text = row.get("error") or f"{row['seconds']:9.3f} s  {row['peak_extra_mib']:10.0f} MiB"
        print(f"{name:14s} {text}", flush=True)
    return rows


def main() -> None:
    args = parse_arguments()
    if args.variant:
        child(args)
        return
    result: dict[str, Any] = {"machine": describe_machine(), "arguments": {**vars(args), "json": None}}
    print(json.dumps(result["machine"]))
    print(f"T = {args.tokens}, H = {args.hidden}, V = {args.vocab}, {args.dtype}; forward + backward")
    rows = result["rows"] = measure_rows(args)
    result["summary"] = [
        (name, row.get("error") or f"{row['seconds']:.4f} s, {row['peak_extra_mib']:.0f} MiB")
        for name, row in rows.items()
    ]
    pairs = [(next(iter(rows)), other) for other in ("full logits", "floor")]
    for one, other in [*pairs, ("ours, no ref", "megatron"), ("no ref, 1 pass", "ours, no ref")]:
        if all("seconds" in rows.get(name, {}) for name in (one, other)):
            ratios = [rows[one][k] / max(rows[other][k], 1e-9) for k in ("seconds", "peak_extra_mib")]
            print(f"{one} / {other}: time {ratios[0]:.2f}, peak extra memory {ratios[1]:.3f}")
            result["summary"].append((f"{one} / {other}", f"time {ratios[0]:.2f}, memory {ratios[1]:.3f}"))
    if torch.cuda.is_available():
        widths = (args.vocab // 8, args.vocab)
        result["logits"] = [logits_bandwidth(args.tokens, w) for w in widths]
        result["matrix"] = [matrix_share(args, w) for w in widths]
        for row in result["logits"] + result["matrix"]:
            said = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
            print(said)
            result["summary"].append(("rates", ", ".join(f"{k} {v}" for k, v in said.items())))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
