"""Packs sequences of any length into micro-batches under a token budget.

T packed tokens, S packed sequences.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from megatron_dgpo.types import PackedBatch

if TYPE_CHECKING:
    from types import ModuleType

_packing: ModuleType | None
try:
    from megatron_dgpo.data import _packing
except ImportError:  # the extension was not built; balanced_bins says so
    _packing = None

logger = logging.getLogger(__name__)
_said = False

EMPTY = -1
"""The sample id of a shared prompt, and of the dummy sequence of `empty_batch`."""
_LEAST_SAVED = 1 / 8
"""Of a group's positions; where sharing the prompt saves less, small parts fit better into micro-batches."""
_MOST_REPEATED = 4
"""Attention lays a shared prompt before each of its responses again: its positions are at most so many times
the budget."""


@dataclass(frozen=True)
class PackItem:
    """One sequence to train on; both parts have at least one token."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    advantage: float = 0.0

    @property
    def num_positions(self) -> int:
        """Tokens it takes in a PackedBatch: the last one is a target only."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


def pack(
    sequences: Sequence[PackItem],
    *,
    max_tokens: int,
    device: torch.device | str = "cpu",
    min_batches: int = 1,
    share_prompts: bool = False,
) -> list[PackedBatch]:
    """Whole sequences in micro-batches of at most `max_tokens` positions and similar sizes.

    `sample_ids` of each batch are positions in `sequences`, ascending but for shared prompts; every sequence
    is in exactly one batch. With `share_prompts` the responses to equal prompts have one copy of it (see
    PackedBatch) in each micro-batch, where that saves an eighth of their positions. Where there are fewer
    sequences than `min_batches` (ranks have to do equally many), batches from `empty_batch` make up the
    number.

    Raises ValueError for a sequence without prompt or response tokens, or longer than `max_tokens`.
    """
    for index, item in enumerate(sequences):
        if not len(item.prompt_ids) or not len(item.response_ids):
            raise ValueError(
                f"sequence {index} has {len(item.prompt_ids)} prompt and {len(item.response_ids)} response "
                "tokens; packing needs at least one of each"
            )
    lengths = [item.num_positions for item in sequences]
    _check(lengths, max_tokens, min_batches)
    parts = _parts(sequences, max_tokens) if share_prompts else [[index] for index in range(len(lengths))]
    bins = balanced_bins([_size(sequences, part) for part in parts], max_tokens, min_batches)
    batches = [_build(sequences, [parts[p] for p in bin_], device) for bin_ in bins]
    batches += [empty_batch(device) for _ in range(min_batches - len(batches))]
    return batches


def empty_batch(device: torch.device | str = "cpu") -> PackedBatch:
    """One dummy sequence of one position that no loss counts, for a rank with nothing to train on."""
    batch = _build([PackItem((0,), (0,))], [[0]], device)
    batch.loss_mask_T.zero_()
    batch.sample_ids = [EMPTY]
    return batch


def unpack(
    batches: Sequence[PackedBatch], values: Sequence[torch.Tensor], num_sequences: int
) -> list[torch.Tensor]:
    """Undo `pack` for per-token numbers: each sequence's values at its response tokens.

    `values` holds one (T,) or (T, ...) tensor a batch. Returns `num_sequences` tensors of shape
    (response tokens, ...), in the order of the list that was packed; dummy sequences are left out.

    Raises ValueError where a sequence is missing or there twice.
    """
    found: dict[int, torch.Tensor] = {}
    for batch, value in zip(batches, values, strict=True):
        bounds = batch.cu_seqlens.tolist()
        for sample, start, end in zip(batch.sample_ids, bounds, bounds[1:], strict=False):
            if sample == EMPTY:
                continue
            if sample in found:
                raise ValueError(f"sequence {sample} is in two batches")
            found[sample] = value[start:end][batch.loss_mask_T[start:end]]
    missing = [index for index in range(num_sequences) if index not in found]
    if missing or len(found) != num_sequences:
        raise ValueError(
            f"expected sequences 0 to {num_sequences - 1}: missing {missing[:5]}, found {len(found)} in all"
        )
    return [found[index] for index in range(num_sequences)]


def _parts(sequences: Sequence[PackItem], max_tokens: int) -> list[list[int]]:
    """The sequences in parts that stay together: those with a prompt to share, in runs that fit into the
    budget, and each of the others alone."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(sequences):
        by_prompt.setdefault(tuple(item.prompt_ids), []).append(index)
    parts = []
    for members in by_prompt.values():
        run: list[int] = []
        for index in members:
            if run and _size(sequences, [*run, index]) > max_tokens:
                parts.append(run)
                run = []
            run.append(index)
        parts.append(run)
    return sorted(one for part in parts for one in _worth_sharing(sequences, part))


def _worth_sharing(sequences: Sequence[PackItem], part: list[int]) -> list[list[int]]:
    saved = (len(part) - 1) * (len(sequences[part[0]].prompt_ids) - 1)
    if saved and saved >= _LEAST_SAVED * sum(sequences[index].num_positions for index in part):
        return [part]
    return [[index] for index in part]


def _size(sequences: Sequence[PackItem], part: list[int]) -> int:
    """What a part takes of the budget."""
    whole = sum(sequences[index].num_positions for index in part)
    own = whole - (len(part) - 1) * (len(sequences[part[0]].prompt_ids) - 1)
    return max(own, -(-whole // _MOST_REPEATED))


class _Segment(NamedTuple):
    """A sequence of a batch. Its tokens are inputs but for the last, and targets but for the first."""

    ids: Sequence[Sequence[int]]
    """Its tokens in pieces."""
    length: int
    """Of its tokens."""
    first: int
    """Position of the first of them."""
    unmasked: int
    """Targets before those that count."""
    sample: int
    prompt: int = -1
    """The segment that comes before it."""


def _segments(sequences: Sequence[PackItem], parts: Sequence[list[int]]) -> list[_Segment]:
    out: list[_Segment] = []
    for part in parts:
        prompt = sequences[part[0]].prompt_ids
        p, place = len(prompt), len(out)
        if len(part) > 1:
            out.append(_Segment([prompt], p, 0, p - 1, EMPTY))
        for index in part:
            response = sequences[index].response_ids
            if len(part) > 1:
                own = [prompt[-1:], response]
                out.append(_Segment(own, len(response) + 1, p - 1, 0, index, place))
            else:
                out.append(_Segment([prompt, response], p + len(response), 0, p - 1, index))
    return out


def _build(
    sequences: Sequence[PackItem], parts: Sequence[list[int]], device: torch.device | str
) -> PackedBatch:
    segments = _segments(sequences, parts)
    flat = np.concatenate([np.asarray(ids, dtype=np.int64) for s in segments for ids in s.ids])
    lengths_S = np.array([s.length for s in segments])
    ends_S = np.cumsum(lengths_S)
    is_input = np.ones(len(flat), dtype=bool)
    is_input[ends_S - 1] = False
    is_target = np.ones(len(flat), dtype=bool)
    is_target[ends_S - lengths_S] = False
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths_S - 1)])
    within_T = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths_S - 1)
    counts_T = within_T >= np.repeat([s.unmasked for s in segments], lengths_S - 1)
    positions_T = within_T + np.repeat([s.first for s in segments], lengths_S - 1)
    advantages = [0.0 if s.sample == EMPTY else sequences[s.sample].advantage for s in segments]
    return PackedBatch(
        tokens_T=torch.from_numpy(flat[is_input]).to(device),
        targets_T=torch.from_numpy(flat[is_target]).to(device),
        positions_T=torch.from_numpy(positions_T).to(device),
        loss_mask_T=torch.from_numpy(counts_T).to(device),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)).to(device),
        advantages_S=torch.tensor(advantages, dtype=torch.float32, device=device),
        sample_ids=[s.sample for s in segments],
        shared_prompts=[s.prompt for s in segments] if any(len(part) > 1 for part in parts) else [],
    )


def balanced_bins(lengths: Sequence[int], max_tokens: int, min_bins: int = 1) -> list[list[int]]:
    """Spread sequences over bins of at most `max_tokens` tokens and similar totals.

    The number of bins is what first-fit-decreasing needs, or `min_bins` where that is more, but never
    more than there are sequences, so that no bin is empty. Sequences go in order of falling length to
    the lightest bin (Graham's LPT rule); in the rare case that this overruns the budget, the
    first-fit-decreasing bins are levelled instead. Ties go to the lower index, so the answer is
    deterministic; indices ascend in each bin and the bins ascend by their first index.

    Computed in C++ where the extension was built and in Python otherwise, with equal answers.

    Raises ValueError where a length is below 1 or above `max_tokens`.
    """
    global _said
    lengths = [int(length) for length in lengths]
    _check(lengths, max_tokens, min_bins)
    if _packing is not None:
        bins: list[list[int]] = _packing.balanced_bins(lengths, max_tokens, min_bins)
        return bins
    if not _said:
        logger.warning("the C++ extension megatron_dgpo.data._packing is not built: packing in Python")
        _said = True
    return balanced_bins_python(lengths, max_tokens, min_bins)


def _check(lengths: Sequence[int], max_tokens: int, min_bins: int) -> None:
    if min_bins < 1:
        raise ValueError(f"min_bins is {min_bins}, expected at least 1")
    if lengths and min(lengths) < 1:
        raise ValueError(f"lengths[{lengths.index(min(lengths))}] is {min(lengths)}, expected at least 1")
    long = [f"sequence {index} has {length}" for index, length in enumerate(lengths) if length > max_tokens]
    if long:
        more = f" and {len(long) - 8} more" if len(long) > 8 else ""
        raise ValueError(f"sequences longer than max_tokens={max_tokens}: {', '.join(long[:8])}{more}")


def balanced_bins_python(lengths: Sequence[int], max_tokens: int, min_bins: int = 1) -> list[list[int]]:
    """The twin of the C++ function: same arguments, same answer, same errors."""
    _check(lengths, max_tokens, min_bins)
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    fitted = _first_fit(lengths, order, max_tokens)
    count = min(max(len(fitted), min_bins), len(lengths))
    bins = _lightest_first(lengths, order, max_tokens, count)
    if bins is None:
        bins = fitted + [[] for _ in range(count - len(fitted))]
        _level(lengths, bins)
    return sorted(sorted(bin_) for bin_ in bins)


def _first_fit(lengths: Sequence[int], order: list[int], max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    loads: list[int] = []
    for index in order:
        for place, load in enumerate(loads):
            if load + lengths[index] <= max_tokens:
                bins[place].append(index)
                loads[place] += lengths[index]
                break
        else:
            bins.append([index])
            loads.append(lengths[index])
    return bins


def _lightest_first(
    lengths: Sequence[int], order: list[int], max_tokens: int, count: int
) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, place) for place in range(count)]
    for index in order:
        load, place = heap[0]
        if load + lengths[index] > max_tokens:  # then it fits into no bin at all
            return None
        bins[place].append(index)
        heapq.heapreplace(heap, (load + lengths[index], place))
    return bins


def _level(lengths: Sequence[int], bins: list[list[int]]) -> None:
    """Move sequences, in place, from the heaviest bin that can spare one to the lightest.

    A move needs the sequence to be shorter than the gap, so the larger of the two totals falls: the
    budget holds, the sum of squared totals falls, and the loop ends.
    """
    loads = [sum(lengths[index] for index in bin_) for bin_ in bins]
    while True:
        donors = [place for place, bin_ in enumerate(bins) if len(bin_) > 1]
        if not donors:
            return
        high = max(donors, key=lambda place: (loads[place], -place))
        low = min(range(len(bins)), key=lambda place: (loads[place], place))
        gap = loads[high] - loads[low]
        movable = [index for index in bins[high] if lengths[index] < gap]
        if not movable:
            return
        index = max(movable, key=lambda index: (lengths[index], -index))
        bins[high].remove(index)
        bins[low].append(index)
        loads[high] -= lengths[index]
        loads[low] += lengths[index]
