"""Vocabulary-parallel token statistics in Triton: the fused implementation of `driver.Kernels`.

Shape suffixes: T packed tokens (C a chunk of them), K local vocabulary shard, B tiles of a row.

Forward reads each logit once. A program reduces a tile of the vocabulary (policy and reference, held in
registers) to the numbers of `shards.reduce_shard`, with the tile's own maxima and the Hellinger distance
*conditional on the tile*; a second kernel merges a row's tiles by the chain rule by which ranks are
merged (`shards.merge_shards`). So nothing is accumulated against a running maximum, no term of the
distance is negative, and every term is exactly 0 where the logits are equal. Backward reads each logit
once and writes its gradient. Arithmetic is float32 for float32, bfloat16 and float16 logits.

Inside the kernels a logit is x = (z - peak) log2(e) / (2 temperature), so that one exp2 gives sqrt(e^..)
for the distance and its square for everything else. Multiplications and additions are not contracted
(`enable_fp_fusion=False`): policy and reference must round alike for the zeros to be exact.

Without a GPU the kernels run in Triton's interpreter, where TRITON_INTERPRET=1 is set before Triton is
first imported; that is for tests.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from megatron_dgpo.ops.driver import Incoming, Kernels, Plan
from megatron_dgpo.ops.shards import FLOOR, PAIR_ROWS, POLICY_ROWS, padding_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_FLOOR = tl.constexpr(FLOOR)
_TWO_LN2 = tl.constexpr(2.0 * math.log(2.0))
_NAN = tl.constexpr(tl.PropagateNan.ALL)
"""A NaN logit has to reach the results; the hardware's maximum drops it otherwise."""


@triton.jit
def _exponents(z, peak, scale):
    """(z - peak) * scale, FLOOR for masked columns."""
    return tl.maximum((z - peak[:, None]) * scale, _FLOOR, propagate_nan=_NAN)


@triton.jit
def _tile_logits(ptr, row_offset, column, inside):
    tile = tl.load(ptr + row_offset[:, None] + column[None, :], mask=inside, other=float("-inf"))
    return tile.to(tl.float32)


@triton.jit
def _reduce_kernel(
    logits_ptr,
    reference_ptr,
    columns_ptr,
    parts_ptr,
    tokens,
    width,
    logits_stride,
    reference_stride,
    tiles,
    scale,
    HAS_REFERENCE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile's numbers, with peaks and targets as raw logits, to parts (4 or 9, T, B)."""
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    live = row < tokens
    row = row.to(tl.int64)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    inside = live[:, None] & (column < width)[None, :]
    z = _tile_logits(logits_ptr, row * logits_stride, column, inside)
    peak = tl.maximum(tl.max(z, 1), _FLOOR)
    x = _exponents(z, peak, scale)
    root = tl.exp2(x)
    e = root * root
    total = tl.sum(e, 1)
    numerator = tl.sum(e * x, 1)

    target = tl.load(columns_ptr + row, mask=live, other=-1)
    held = live & (target >= tile * BLOCK) & (target < tl.minimum(tile * BLOCK + BLOCK, width))
    target_z = tl.load(logits_ptr + row * logits_stride + target, mask=held, other=0.0).to(tl.float32)
    out = parts_ptr + row * tiles + tile
    step = tl.cast(tokens, tl.int64) * tiles  # Triton makes an argument that is 1 a plain int
    tl.store(out, peak, mask=live)
    tl.store(out + step, total, mask=live)
    tl.store(out + 2 * step, numerator, mask=live)
    tl.store(out + 3 * step, target_z, mask=live)
    if HAS_REFERENCE:
        q_z = _tile_logits(reference_ptr, row * reference_stride, column, inside)
        q_peak = tl.maximum(tl.max(q_z, 1), _FLOOR)
        q_x = _exponents(q_z, q_peak, scale)
        q_root = tl.exp2(q_x)
        q_total = tl.sum(q_root * q_root, 1)
        difference = tl.sum(e * (x - q_x), 1)
        # 1/2 sum (sqrt(e / S) - sqrt(e' / S'))^2; a tile masked as a whole has S = 0, any other S >= 1.
        safe = tl.maximum(total, 1.0, propagate_nan=_NAN)
        ratio = tl.sqrt_rn(tl.div_rn(safe, tl.maximum(q_total, 1.0, propagate_nan=_NAN)))
        gap = tl.fma(q_root, tl.broadcast_to(-ratio[:, None], (ROWS, BLOCK)), root)
        distance = 0.5 * tl.sum(gap * gap, 1) / safe
        q_target_z = tl.load(reference_ptr + row * reference_stride + target, mask=held, other=0.0)
        tl.store(out + 4 * step, q_peak, mask=live)
        tl.store(out + 5 * step, q_total, mask=live)
        tl.store(out + 6 * step, q_target_z.to(tl.float32), mask=live)
        tl.store(out + 7 * step, distance, mask=live)
        tl.store(out + 8 * step, difference, mask=live)


@triton.jit
def _weighted(peak_b, total_b, scale):
    """Peak of the row, each tile's exponent below it, its factor and its mass, and the total."""
    peak = tl.max(peak_b, 1)
    x_b = _exponents(peak_b, peak, scale)
    root_b = tl.exp2(x_b)
    factor_b = root_b * root_b
    mass_b = factor_b * total_b
    return peak, x_b, factor_b, mass_b, tl.sum(mass_b, 1)


@triton.jit
def _merge_kernel(
    parts_ptr,
    rows_ptr,
    tokens,
    tiles,
    scale,
    inverse_temperature,
    HAS_REFERENCE: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """A row's tiles to the numbers of `shards.reduce_shard`, (4 or 9, T), over the temperature."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tokens
    row = row.to(tl.int64)
    tile = tl.arange(0, TILES)
    inside = live[:, None] & (tile < tiles)[None, :]
    parts = parts_ptr + row[:, None] * tiles + tile[None, :]
    step = tl.cast(tokens, tl.int64) * tiles  # Triton makes an argument that is 1 a plain int
    total_b = tl.load(parts + step, mask=inside, other=0.0)
    peak_b = tl.load(parts, mask=inside, other=_FLOOR)
    peak, x_b, factor_b, mass_b, total = _weighted(peak_b, total_b, scale)
    numerator_b = tl.load(parts + 2 * step, mask=inside, other=0.0)
    numerator = tl.sum(factor_b * (numerator_b + x_b * total_b), 1)
    target = tl.sum(tl.load(parts + 3 * step, mask=inside, other=0.0), 1)
    out = rows_ptr + row
    tl.store(out, tl.maximum(peak * inverse_temperature, _FLOOR), mask=live)
    tl.store(out + tokens, total, mask=live)
    tl.store(out + 2 * tokens, numerator * _TWO_LN2, mask=live)
    tl.store(out + 3 * tokens, target * inverse_temperature, mask=live)
    if HAS_REFERENCE:
        q_total_b = tl.load(parts + 5 * step, mask=inside, other=0.0)
        q_peak_b = tl.load(parts + 4 * step, mask=inside, other=_FLOOR)
        q_peak, q_x_b, q_factor_b, q_mass_b, q_total = _weighted(q_peak_b, q_total_b, scale)
        q_target = tl.sum(tl.load(parts + 6 * step, mask=inside, other=0.0), 1)
        distance_b = tl.load(parts + 7 * step, mask=inside, other=0.0)
        difference_b = tl.load(parts + 8 * step, mask=inside, other=0.0)
        safe = tl.maximum(total, 1.0, propagate_nan=_NAN)
        q_safe = tl.maximum(q_total, 1.0, propagate_nan=_NAN)
        a = tl.sqrt_rn(tl.div_rn(mass_b, tl.broadcast_to(safe[:, None], (ROWS, TILES))))
        b = tl.sqrt_rn(tl.div_rn(q_mass_b, tl.broadcast_to(q_safe[:, None], (ROWS, TILES))))
        distance = tl.sum(0.5 * (a - b) * (a - b) + a * b * distance_b, 1)
        difference = tl.sum(factor_b * (difference_b + (x_b - q_x_b) * total_b), 1)
        tl.store(out + 4 * tokens, tl.maximum(q_peak * inverse_temperature, _FLOOR), mask=live)
        tl.store(out + 5 * tokens, q_total, mask=live)
        tl.store(out + 6 * tokens, q_target * inverse_temperature, mask=live)
        tl.store(out + 7 * tokens, distance, mask=live)
        tl.store(out + 8 * tokens, difference * _TWO_LN2, mask=live)


@triton.jit
def _gradient_kernel(
    logits_ptr,
    out_ptr,
    columns_ptr,
    peak_ptr,
    log_partition_ptr,
    entropy_ptr,
    grad_log_probs_ptr,
    grad_entropy_ptr,
    tokens,
    width,
    out_width,
    logits_stride,
    out_stride,
    tiles,
    inverse_temperature,
    HAS_ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d log p(y) / dz_j = [j = y] - p_j and dH / dz_j = -p_j (log p_j + H); 0 for padding columns.

    out may be the logits themselves: each is read by the program that writes it, before it does.
    """
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    live = row < tokens
    row = row.to(tl.int64)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    inside = live[:, None] & (column < width)[None, :]
    z = _tile_logits(logits_ptr, row * logits_stride, column, inside) * inverse_temperature
    target = tl.load(columns_ptr + row, mask=live, other=-1)
    peak = tl.load(peak_ptr + row, mask=live, other=0.0)
    log_partition = tl.load(log_partition_ptr + row, mask=live, other=0.0)
    slope = tl.load(grad_log_probs_ptr + row, mask=live, other=0.0)
    # Two subtractions: peak + log_partition would round away what log_partition adds.
    log_p = tl.maximum(z - peak[:, None] - log_partition[:, None], _FLOOR, propagate_nan=_NAN)
    p = tl.exp(log_p)
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + row, mask=live, other=0.0)
        grad_entropy = tl.load(grad_entropy_ptr + row, mask=live, other=0.0)
        grad = -p * (slope[:, None] + grad_entropy[:, None] * (log_p + entropy[:, None]))
    else:
        grad = -p * slope[:, None]
    grad = tl.where(column[None, :] == target[:, None], grad + slope[:, None], grad)
    grad = tl.where(inside, grad, 0.0)
    here = live[:, None] & (column < out_width)[None, :]
    out = out_ptr + (row * out_stride)[:, None] + column[None, :]
    tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=here)


INTERPRETED = isinstance(_reduce_kernel, InterpretedFunction)
"""Whether the kernels run in Triton's interpreter, on CPU tensors."""

_REDUCE_BLOCK = 4096
_GRADIENT_BLOCK = 2048
"""Columns of a tile, for programs of 4 warps. Compiled for Hopper, a policy-and-reference tile costs 41
instructions a column at 4096 (no more than a bfloat16 pair may cost there to keep up with memory) and 58 at
2048, where the tile's own reductions weigh more; 8192 would not fit the registers. The gradient has no
reductions, and at 2048 columns fills a multiprocessor with programs."""


def _tiling(tokens: int, width: int, widest: int) -> tuple[int, int, int]:
    """(rows and columns of a tile, tiles of a row). The width alone decides on a GPU, so that a token's
    numbers do not depend on how many others there are."""
    block = min(triton.next_power_of_2(width), widest)
    # The interpreter pays by the operation, not by the element.
    rows = min(triton.next_power_of_2(tokens), 64) if INTERPRETED else max(1, widest // block)
    return rows, block, triton.cdiv(width, block)


def _unit_columns(logits_CK: torch.Tensor) -> torch.Tensor:
    return logits_CK if logits_CK.stride(1) == 1 else logits_CK.contiguous()


def _reduce(
    logits_CK: torch.Tensor,
    columns_C: torch.Tensor,
    reference_CK: torch.Tensor | None,
    plan: Plan,
    owned: bool,
) -> torch.Tensor:
    tokens, has_reference = logits_CK.shape[0], reference_CK is not None
    if tokens == 0 or plan.width == 0:
        return padding_rows(logits_CK, has_reference, torch.float32)
    logits_CK = _unit_columns(logits_CK)
    reference = logits_CK if reference_CK is None else _unit_columns(reference_CK)
    rows, block, tiles = _tiling(tokens, plan.width, _REDUCE_BLOCK)
    numbers = PAIR_ROWS if has_reference else POLICY_ROWS
    parts = logits_CK.new_empty(numbers, tokens, tiles, dtype=torch.float32)
    out = logits_CK.new_empty(numbers, tokens, dtype=torch.float32)
    scale = 0.5 * math.log2(math.e) / plan.temperature
    with torch.cuda.device_of(logits_CK):
        _reduce_kernel[(triton.cdiv(tokens, rows) * tiles,)](
            logits_CK,
            reference,
            columns_C,
            parts,
            tokens,
            plan.width,
            logits_CK.stride(0),
            reference.stride(0),
            tiles,
            scale,
            HAS_REFERENCE=has_reference,
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
        )
        tiles_padded = triton.next_power_of_2(tiles)
        rows = 64 if INTERPRETED else max(1, 1024 // tiles_padded)
        _merge_kernel[(triton.cdiv(tokens, rows),)](
            parts,
            out,
            tokens,
            tiles,
            scale,
            1.0 / plan.temperature,
            HAS_REFERENCE=has_reference,
            ROWS=rows,
            TILES=tiles_padded,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


def _write_gradient(logits_CK: torch.Tensor, out_CK: torch.Tensor, incoming: Incoming, plan: Plan) -> None:
    tokens, out_width = out_CK.shape
    if tokens == 0 or out_width == 0:
        return
    if INTERPRETED and out_CK.dtype == torch.bfloat16:
        # The interpreter truncates to bfloat16; the hardware rounds, as torch does.
        wide_CK = torch.empty_like(out_CK, dtype=torch.float32)
        _write_gradient(logits_CK, wide_CK, incoming, plan)
        out_CK.copy_(wide_CK)
        return
    logits_CK = _unit_columns(logits_CK)
    rows, block, tiles = _tiling(tokens, out_width, _GRADIENT_BLOCK)
    entropy_grad = incoming.grad_entropy
    with torch.cuda.device_of(logits_CK):
        _gradient_kernel[(triton.cdiv(tokens, rows) * tiles,)](
            logits_CK,
            out_CK,
            incoming.columns,
            incoming.peak,
            incoming.log_partition,
            incoming.entropy,
            incoming.grad_log_probs.contiguous(),
            incoming.grad_log_probs if entropy_grad is None else entropy_grad.contiguous(),
            tokens,
            plan.width,
            out_width,
            logits_CK.stride(0),
            out_CK.stride(0),
            tiles,
            1.0 / plan.temperature,
            HAS_ENTROPY=entropy_grad is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
        )


def _into_gradient(
    logits_CK: torch.Tensor, dtype: torch.dtype, incoming: Incoming, plan: Plan
) -> torch.Tensor:
    out_CK = logits_CK if dtype == logits_CK.dtype else torch.empty_like(logits_CK, dtype=dtype)
    _write_gradient(logits_CK, out_CK, incoming, plan)
    return out_CK


KERNELS = Kernels(_reduce, _write_gradient, _into_gradient)
