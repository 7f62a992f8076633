"""Per-token statistics over a vocabulary that is sharded across tensor-parallel ranks.

Shape suffixes: T packed tokens, V vocabulary, K local vocabulary shard, H hidden size.

The vocabulary lies in contiguous ranges of K columns in rank order; columns at or beyond
`vocab_size` are padding and contribute nothing: no probability, entropy, distance or gradient.

Implementations: "reference" (`ops/reference.py`, gathers the vocabulary: the truth), "eager"
(`ops/eager.py`, torch, never gathers it) and "fused" (`ops/fused.py`, Triton: each logit is read once
forward and once backward). "auto" is "fused" for CUDA tensors where Triton is installed, else "eager";
float64 is never "fused".
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import torch
import torch.distributed as dist

from megatron_dgpo.ops import driver, eager, reference
from megatron_dgpo.ops.collectives import group_rank, group_size
from megatron_dgpo.types import TokenStats

__all__ = ["IMPLEMENTATIONS", "TokenStats", "linear_token_stats", "token_stats"]

log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "eager", "fused", "reference")

_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
"""float32 logits of one chunk. A GPU needs more tokens a chunk, since each chunk reads the whole
LM-head shard once."""

_announced: set[str] = set()


def _why_not_fused(tensors: tuple[torch.Tensor | None, ...]) -> str | None:
    """What keeps the Triton kernels from these tensors, or None."""
    try:
        from megatron_dgpo.ops import fused
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return "Triton is not installed"

    for tensor in tensors:
        if tensor is not None and tensor.dtype not in fused.DTYPES:
            return f"{tensor.dtype} inputs: needs float32, bfloat16 or float16"
        if tensor is not None and tensor.is_cuda == fused.INTERPRETED:
            return (
                f"tensors on {tensor.device}: needs a CUDA device without TRITON_INTERPRET, or CPU tensors "
                "with TRITON_INTERPRET=1 set before Triton is imported"
            )
    return None


def _implementation(impl: str, *tensors: torch.Tensor | None) -> str:
    """The implementation to use; `tensors` are the logits, or what they are the product of."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "fused":
        reason = _why_not_fused(tensors)
        if reason is not None:
            raise ValueError(f"impl='fused': {reason}; impl='eager' runs everywhere")
    if impl != "auto":
        return impl
    on_gpu = any(x is not None and x.is_cuda for x in tensors)
    reason = _why_not_fused(tensors) if on_gpu else "tensors on the CPU"
    choice = "fused" if reason is None else "eager"
    if choice not in _announced:
        log.info("token statistics: impl=auto is %s%s", choice, f" ({reason})" if reason else "")
        _announced.add(choice)
    return choice


def load_kernels(impl: str) -> driver.Kernels:
    """The kernels of "eager" or "fused"."""
    if impl == "eager":
        return eager.KERNELS
    from megatron_dgpo.ops import fused

    return fused.KERNELS


def default_chunk_size(shard_size: int, device_type: str) -> int:
    """Tokens whose float32 logits over `shard_size` columns exist at a time."""
    return max(1, _CHUNK_BYTES.get(device_type, _CHUNK_BYTES["cpu"]) // (4 * shard_size))


def _check_targets(targets: torch.Tensor, num_tokens: int, vocab_size: int) -> None:
    if targets.shape != (num_tokens,) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets: got {targets.dtype} {tuple(targets.shape)}, need torch.int64 ({num_tokens},), "
            "one global id for each row of logits"
        )
    if num_tokens:
        low, high = (int(x) for x in torch.stack(torch.aminmax(targets)).tolist())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"targets: ids span {low}..{high}, need 0..{vocab_size - 1}")


def _check_shard(name: str, shard: torch.Tensor) -> None:
    if shard.dim() != 2 or not shard.is_floating_point() or shard.shape[-1] == 0:
        raise ValueError(f"{name}: got {shard.dtype} {tuple(shard.shape)}, need a 2-D floating-point tensor")


def _plan(
    shard_size: int,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
    temperature: float,
    chunk_size: int | None,
    device_type: str,
    entropy_grad: bool,
    sequence_parallel: bool = False,
) -> tuple[driver.Plan, int]:
    """The call's plan and the true vocabulary size."""
    columns = shard_size * group_size(group)
    vocab_size = columns if vocab_size is None else vocab_size
    if not 1 <= vocab_size <= columns:
        raise ValueError(
            f"vocab_size={vocab_size}: {group_size(group)} shards of {shard_size} columns "
            f"hold a vocabulary of 1 to {columns}"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature}: must be a finite number greater than 0")
    if chunk_size is None:
        chunk_size = default_chunk_size(shard_size, device_type)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1 token")
    first = group_rank(group) * shard_size
    plan = driver.Plan(
        group=group,
        first=first,
        width=min(max(vocab_size - first, 0), shard_size),
        temperature=float(temperature),
        chunk_size=chunk_size,
        entropy_grad=entropy_grad,
        sequence_parallel=sequence_parallel and group_size(group) > 1,
    )
    return plan, vocab_size


def token_stats(
    policy_logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    reference_logits: torch.Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    impl: str = "auto",
) -> TokenStats:
    """Statistics of each token from vocabulary shards of logits.

    policy_logits, reference_logits: (T, K) this rank's shard, float32, bfloat16 or float16 (float64
    is kept, and then so are the outputs); never modified. targets: (T,) int64 global ids, the same
    on every rank. vocab_size: the true size, without padding. temperature divides the logits of both.

    Returns TokenStats, each field (T,) float32, in nats but for the squared Hellinger distance
    (Eq. 2, arXiv 2605.03327), which is in [0, 1]. Gradients flow to policy_logits through log_probs,
    and through entropy with `entropy_grad`. Without reference_logits the three reference fields are
    None and cost nothing. Columns of -inf are masked tokens.

    Raises ValueError for shapes, dtypes, ids or settings that do not fit.
    """
    _check_shard("policy_logits", policy_logits)
    if reference_logits is not None:
        _check_shard("reference_logits", reference_logits)
        if reference_logits.shape != policy_logits.shape:
            raise ValueError(
                f"reference_logits: got {tuple(reference_logits.shape)}, need the policy's "
                f"{tuple(policy_logits.shape)}"
            )
    impl = _implementation(impl, policy_logits, reference_logits)
    plan, vocab_size = _plan(
        policy_logits.shape[1],
        tp_group,
        vocab_size,
        temperature,
        # The kernels keep no float32 copy of the logits, so they need no chunks.
        max(policy_logits.shape[0], 1) if impl == "fused" else None,
        policy_logits.device.type,
        entropy_grad,
    )
    _check_targets(targets, policy_logits.shape[0], vocab_size)
    if impl == "reference":
        return reference.token_stats(
            policy_logits,
            targets,
            reference_logits,
            group=tp_group,
            vocab_size=vocab_size,
            temperature=temperature,
            entropy_grad=entropy_grad,
        )
    return driver.token_stats(policy_logits, targets, reference_logits, plan, load_kernels(impl))


def _check_linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    reference_hidden: torch.Tensor | None,
    reference_weight: torch.Tensor | None,
    num_tokens: int,
    scattered_ranks: int,
) -> None:
    _check_shard("policy_hidden", hidden)
    _check_shard("policy_weight", weight)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"policy_weight: got {tuple(weight.shape)}, need (K, {hidden.shape[1]}) "
            f"for policy_hidden {tuple(hidden.shape)}"
        )
    if hidden.shape[0] * scattered_ranks != num_tokens:
        raise ValueError(
            f"policy_hidden: got {hidden.shape[0]} rows, need {num_tokens / scattered_ranks:g} "
            f"for {num_tokens} targets over {scattered_ranks} sequence-parallel ranks"
        )
    if (reference_hidden is None) != (reference_weight is None):
        raise ValueError("reference_hidden and reference_weight: give both or neither")
    if reference_hidden is None or reference_weight is None:
        return
    _check_shard("reference_hidden", reference_hidden)
    _check_shard("reference_weight", reference_weight)
    if reference_weight.shape[0] != weight.shape[0] or reference_weight.shape[1] != reference_hidden.shape[1]:
        raise ValueError(
            f"reference_weight: got {tuple(reference_weight.shape)}, "
            f"need ({weight.shape[0]}, {reference_hidden.shape[1]})"
        )
    if reference_hidden.shape[0] not in (num_tokens, hidden.shape[0]):
        raise ValueError(
            f"reference_hidden: got {reference_hidden.shape[0]} rows, need {hidden.shape[0]} "
            f"(as policy_hidden) or {num_tokens} (all tokens)"
        )


def linear_token_stats(
    policy_hidden: torch.Tensor,
    policy_weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    reference_hidden: torch.Tensor | None = None,
    reference_weight: torch.Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    rows: torch.Tensor | None = None,
    chunk_size: int | None = None,
    entropy_grad: bool = False,
    sequence_parallel: bool = False,
    impl: str = "auto",
) -> TokenStats:
    """`token_stats` of the logits policy_hidden @ policy_weight.T, which exist only chunk by chunk, in
    the backward pass too (recomputed there).

    policy_hidden: (T, H), equal on every rank; with sequence_parallel this rank's (T / tp, H) rows,
    gathered on the way in and reduce-scattered on the way back. policy_weight: (K, H), this rank's
    LM-head rows. Half inputs are multiplied with float32 sums and float32 logits. The reference pair
    has the same layout (reference_hidden may have all T rows in either case) and takes no gradient.
    rows: (R,) int64, the tokens whose statistics are wanted, each once, the same on every rank; the head's
    products are made for these alone, and all fields are 0 at the others. By default all T.
    chunk_size: tokens whose logits exist at a time; by default about 32 MB of them, 256 MB on a GPU.

    The gradient of policy_hidden is summed over tp_group; that of policy_weight is this shard's, and is
    added to `policy_weight.main_grad` where Megatron's DDP has put such a buffer of the compute dtype
    (policy_weight.grad then stays 0). On a GPU the logits' gradient is rounded to half inputs' dtype for
    those two products.

    Raises ValueError for shapes, dtypes, ids or settings that do not fit.
    """
    scattered_ranks = group_size(tp_group) if sequence_parallel else 1
    _check_linear(
        policy_hidden, policy_weight, reference_hidden, reference_weight, targets.numel(), scattered_ranks
    )
    impl = _implementation(impl, policy_hidden, policy_weight, reference_hidden, reference_weight)
    plan, vocab_size = _plan(
        policy_weight.shape[0],
        tp_group,
        vocab_size,
        temperature,
        chunk_size,
        policy_hidden.device.type,
        entropy_grad,
        sequence_parallel,
    )
    _check_targets(targets, targets.numel(), vocab_size)
    _check_rows(rows, targets)
    tensors = (policy_hidden, policy_weight, targets, reference_hidden, reference_weight, rows)
    if impl == "reference":
        stats = reference.linear_token_stats(*tensors, plan, vocab_size)
    else:
        stats = driver.linear_token_stats(*tensors, plan, load_kernels(impl))
    return _at(stats, rows, targets.numel())


def _check_rows(rows: torch.Tensor | None, targets: torch.Tensor) -> None:
    if rows is None:
        return
    if rows.dtype != torch.int64 or rows.dim() != 1 or rows.device != targets.device:
        raise ValueError(
            f"rows: got {rows.dtype} {tuple(rows.shape)} on {rows.device}, need torch.int64 (R,) "
            f"on {targets.device}"
        )


def _at(stats: TokenStats, rows: torch.Tensor | None, num_tokens: int) -> TokenStats:
    """(R,) statistics at their places among the tokens, (T,)."""
    if rows is None:
        return stats

    def spread(values_R: torch.Tensor | None) -> torch.Tensor | None:
        if values_R is None:
            return None
        return values_R.new_zeros(num_tokens).index_copy(0, rows, values_R)

    fields: dict[str, Any] = {f.name: spread(getattr(stats, f.name)) for f in dataclasses.fields(stats)}
    return TokenStats(**fields)
