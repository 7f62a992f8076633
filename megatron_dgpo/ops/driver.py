"""The autograd functions that the eager and the fused implementation share.

Shape suffixes: T packed tokens, R those of them whose statistics are wanted (C a chunk of these), K local
vocabulary shard, H hidden size.

An implementation is a `Kernels`: how a chunk of logits becomes the numbers that ranks exchange, and how
it becomes its gradient. Chunks, collectives and the matrix products of the LM head are here. One
all-gather a call merges the ranks, whatever the number of chunks; the backward pass of
`linear_token_stats` adds one reduction of the hidden states' gradient. As everywhere in tensor
parallelism, the loss is taken to be the same on every rank, so the gradients that come back to the
outputs are too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_dgpo.ops.collectives import gather_rows, scatter_row_sums, stack_ranks, sum_ranks
from megatron_dgpo.ops.shards import Merged, merge_shards
from megatron_dgpo.types import TokenStats


@dataclass(frozen=True)
class Plan:
    """The values of one call that are not tensors."""

    group: dist.ProcessGroup | None
    first: int
    """Global id of this rank's column 0."""
    width: int
    """Columns of this shard that are vocabulary; the rest is padding."""
    temperature: float
    chunk_size: int
    """Tokens whose logits exist in float32 at a time."""
    entropy_grad: bool
    sequence_parallel: bool = False


class Incoming(NamedTuple):
    """What the gradient of the logits needs to know of each token, each (T,)."""

    columns: torch.Tensor
    """Targets as local columns; out of range where another rank holds the target."""
    peak: torch.Tensor
    log_partition: torch.Tensor
    entropy: torch.Tensor
    grad_log_probs: torch.Tensor
    """Over the temperature, as is the next."""
    grad_entropy: torch.Tensor | None

    def rows(self, part: slice) -> Incoming:
        return Incoming(
            self.columns[part],
            self.peak[part],
            self.log_partition[part],
            self.entropy[part],
            self.grad_log_probs[part],
            None if self.grad_entropy is None else self.grad_entropy[part],
        )


@dataclass(frozen=True)
class Kernels:
    """An implementation. Logits come as (C, K), any float dtype, not yet over the temperature; columns
    from `Plan.width` on are padding."""

    reduce: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, Plan, bool], torch.Tensor]
    """(logits, columns, reference logits or None, plan, owned) -> what `shards.reduce_shard` returns.
    With `owned`, both logits may be overwritten."""
    write_gradient: Callable[[torch.Tensor, torch.Tensor, Incoming, Plan], None]
    """(logits, out, incoming, plan): writes all K columns of `out`."""
    into_gradient: Callable[[torch.Tensor, torch.dtype, Incoming, Plan], torch.Tensor]
    """(logits, dtype, incoming, plan) -> gradient of the dtype; the logits are consumed."""


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(num_tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, max(num_tokens, 1), size):
        yield slice(start, min(start + size, num_tokens))


def matmul_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with the compute dtype's accumulation *and output*: logits rounded to bfloat16 are off by
    up to 1e-2 in the Hellinger distance."""
    wide = torch.promote_types(compute_dtype(a), compute_dtype(b))
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype == b.dtype != wide:
            return torch.mm(a, b, out_dtype=wide)
        return a.to(wide) @ b.to(wide)


def add_matmul_wide(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b in total's dtype, in place: no second matrix of total's size exists."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype == b.dtype != total.dtype:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _merge(
    policy: Callable[[slice], torch.Tensor],
    reference: Callable[[slice], torch.Tensor] | None,
    targets_T: torch.Tensor,
    plan: Plan,
    kernels: Kernels,
    owned: bool,
) -> Merged:
    """Reduce chunk by chunk, then merge the ranks in one collective."""
    rows = [
        kernels.reduce(
            policy(part), targets_T[part] - plan.first, reference(part) if reference else None, plan, owned
        )
        for part in _chunks(targets_T.shape[0], plan.chunk_size)
    ]
    return merge_shards(stack_ranks(torch.cat(rows, dim=1), plan.group))


def _outputs(ctx: Any, merged: Merged, plan: Plan, kernels: Kernels) -> tuple[torch.Tensor | None, ...]:
    constants = [merged.hellinger, merged.reference_log_probs, merged.reverse_kl]
    if not plan.entropy_grad:
        constants.append(merged.entropy)
    ctx.mark_non_differentiable(*[c for c in constants if c is not None])
    ctx.set_materialize_grads(False)
    ctx.plan, ctx.kernels = plan, kernels
    return (
        merged.log_probs,
        merged.entropy,
        merged.hellinger,
        merged.reference_log_probs,
        merged.reverse_kl,
    )


def _incoming(ctx: Any, grads: tuple[torch.Tensor | None, ...]) -> Incoming:
    plan: Plan = ctx.plan
    targets_T, peak_T, log_partition_T, entropy_T = ctx.saved_tensors[-4:]
    grad_l = torch.zeros_like(entropy_T) if grads[0] is None else grads[0] / plan.temperature
    grad_h = grads[1] / plan.temperature if plan.entropy_grad and grads[1] is not None else None
    return Incoming(targets_T - plan.first, peak_T, log_partition_T, entropy_T, grad_l, grad_h)


class _LogitsStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TK: torch.Tensor,
        targets_T: torch.Tensor,
        reference_TK: torch.Tensor | None,
        plan: Plan,
        kernels: Kernels,
    ) -> tuple[torch.Tensor | None, ...]:
        reference = None if reference_TK is None else reference_TK.__getitem__
        merged = _merge(logits_TK.__getitem__, reference, targets_T, plan, kernels, owned=False)
        ctx.save_for_backward(logits_TK, targets_T, merged.peak, merged.log_partition, merged.entropy)
        return _outputs(ctx, merged, plan, kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        logits_TK, plan = ctx.saved_tensors[0], ctx.plan
        incoming = _incoming(ctx, grads)
        grad_TK = torch.empty_like(logits_TK, memory_format=torch.contiguous_format)
        for part in _chunks(logits_TK.shape[0], plan.chunk_size):
            ctx.kernels.write_gradient(logits_TK[part], grad_TK[part], incoming.rows(part), plan)
        return grad_TK, None, None, None, None


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight_KH: torch.Tensor,
        targets_R: torch.Tensor,
        reference_hidden_TH: torch.Tensor | None,
        reference_weight_KH: torch.Tensor | None,
        rows_R: torch.Tensor | None,
        plan: Plan,
        kernels: Kernels,
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TH = gather_rows(hidden, plan.group) if plan.sequence_parallel else hidden
        policy = _head(hidden_TH, rows_R, _head_rows(weight_KH, plan))
        reference = None
        if reference_hidden_TH is not None and reference_weight_KH is not None:
            reference = _head(reference_hidden_TH, rows_R, _head_rows(reference_weight_KH, plan))
        merged = _merge(policy, reference, targets_R, plan, kernels, owned=True)
        ctx.save_for_backward(
            hidden, weight_KH, rows_R, targets_R, merged.peak, merged.log_partition, merged.entropy
        )
        return _outputs(ctx, merged, plan, kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight_KH, rows_R = ctx.saved_tensors[:3]
        plan: Plan = ctx.plan
        incoming = _incoming(ctx, grads)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        hidden_TH = gather_rows(hidden, plan.group) if plan.sequence_parallel else hidden
        rows_KH = _head_rows(weight_KH, plan)
        logits = _head(hidden_TH, rows_R, rows_KH)
        dtype = torch.promote_types(compute_dtype(hidden), compute_dtype(weight_KH))
        grad_hidden = None
        if want_hidden:
            make = torch.empty_like if rows_R is None else torch.zeros_like  # the others' gradient is 0
            grad_hidden = make(hidden_TH, dtype=dtype)
        total_KH = _gradient_buffer(weight_KH, dtype) if want_weight else None
        grad_rows_KH = None if total_KH is None else total_KH[: plan.width]
        for part in _chunks(incoming.peak.shape[0], plan.chunk_size):
            # Tensor cores take half operands and sum in float32, as in any half-precision LM head.
            grad_CK = ctx.kernels.into_gradient(logits(part), rows_KH.dtype, incoming.rows(part), plan)
            place = part if rows_R is None else rows_R[part]
            if grad_hidden is not None:
                grad_hidden[place] = matmul_wide(grad_CK, rows_KH)
            if grad_rows_KH is not None:
                add_matmul_wide(grad_rows_KH, grad_CK.t(), hidden_TH[place].to(grad_CK.dtype))
            del grad_CK  # before the next chunk's logits exist
        if grad_hidden is not None:
            # Each rank's product covers its own columns only: the gradient is the sum over ranks.
            reduce = scatter_row_sums if plan.sequence_parallel else sum_ranks
            grad_hidden = reduce(grad_hidden, plan.group).to(hidden.dtype)
        grad_weight = None if total_KH is None else _weight_gradient(weight_KH, total_KH)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _gradient_buffer(weight_KH: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where the weight's gradient is summed, (K, H): Megatron's DDP buffer where the parameter has one of
    this dtype, which spares a tensor of the weight's size and the rounding to the weight's dtype."""
    main_grad = getattr(weight_KH, "main_grad", None)
    if main_grad is not None and main_grad.dtype == dtype:
        return main_grad
    return weight_KH.new_zeros(weight_KH.shape, dtype=dtype)


def _weight_gradient(weight_KH: torch.Tensor, total_KH: torch.Tensor) -> torch.Tensor | None:
    """What autograd gets: nothing after a sum in DDP's buffer. DDP's hook needs a gradient to run by all the
    same. Where an embedding is tied to the head on this stage (`zero_out_wgrad`), that is the embedding's,
    which the hook adds to the buffer; else it is a zero in a tensor of the weight's shape without its size,
    which the hook does not add (`grad_added_to_main_grad`; see Megatron's tensor_parallel/layers.py)."""
    if total_KH is not getattr(weight_KH, "main_grad", None):
        return total_KH.to(weight_KH.dtype)
    if not getattr(weight_KH, "zero_out_wgrad", False):
        weight_KH.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        weight_KH.grad = weight_KH.new_zeros(()).expand_as(weight_KH)
    return None


def _head_rows(weight_KH: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The LM head's rows that are vocabulary, (width, H), as matrix products take them: half precision
    stays so only on a GPU."""
    rows_KH = weight_KH[: plan.width]
    return rows_KH if rows_KH.is_cuda else rows_KH.to(compute_dtype(rows_KH))


def _head(
    hidden_TH: torch.Tensor, rows_R: torch.Tensor | None, rows_KH: torch.Tensor
) -> Callable[[slice], torch.Tensor]:
    """The LM head as a function from a chunk to its logits, (C, width)."""
    return lambda part: matmul_wide(hidden_TH[part if rows_R is None else rows_R[part]], rows_KH.t())


def _stats(outputs: tuple[torch.Tensor | None, ...]) -> TokenStats:
    log_probs, entropy, hellinger, reference_log_probs, reverse_kl = outputs
    assert log_probs is not None and entropy is not None
    return TokenStats(log_probs, entropy, hellinger, reference_log_probs, reverse_kl)


def token_stats(
    logits_TK: torch.Tensor,
    targets_T: torch.Tensor,
    reference_TK: torch.Tensor | None,
    plan: Plan,
    kernels: Kernels,
) -> TokenStats:
    if reference_TK is not None:
        reference_TK = reference_TK.detach()
    return _stats(_LogitsStats.apply(logits_TK, targets_T, reference_TK, plan, kernels))


def linear_token_stats(
    hidden: torch.Tensor,
    weight_KH: torch.Tensor,
    targets_T: torch.Tensor,
    reference_hidden: torch.Tensor | None,
    reference_weight_KH: torch.Tensor | None,
    rows_R: torch.Tensor | None,
    plan: Plan,
    kernels: Kernels,
) -> TokenStats:
    if reference_hidden is not None and reference_weight_KH is not None:
        reference_hidden, reference_weight_KH = reference_hidden.detach(), reference_weight_KH.detach()
        if plan.sequence_parallel and reference_hidden.shape[0] != targets_T.shape[0]:
            reference_hidden = gather_rows(reference_hidden, plan.group)
    reference = reference_hidden, reference_weight_KH
    targets_R = targets_T if rows_R is None else targets_T[rows_R]
    return _stats(_LinearStats.apply(hidden, weight_KH, targets_R, *reference, rows_R, plan, kernels))
