"""Packing: tensors against a token-by-token reference, assignment against its properties and its twin."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from megatron_dgpo.data import packing
from megatron_dgpo.data.packing import (
    PackItem,
    balanced_bins,
    balanced_bins_python,
    empty_batch,
    pack,
    unpack,
)

needs_extension = pytest.mark.skipif(
    packing._packing is None, reason="the extension megatron_dgpo.data._packing is not built"
)
# First-fit-decreasing fills three bins of 60 exactly or nearly; falling lengths to the lightest overrun them.
LPT_OVERRUNS = ([30, 30, 20, 20, 20], 60)


def random_items(rng: random.Random, count: int) -> list[PackItem]:
    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(1000) for _ in range(rng.randint(low, high))]

    return [PackItem(ids(1, 9), ids(1, 20), rng.uniform(-2, 2)) for _ in range(count)]


def test_tensors_equal_a_token_by_token_reference():
    items = random_items(random.Random(0), 40)
    batches = pack(items, max_tokens=64)
    assert len(batches) > 5
    assert sorted(index for batch in batches for index in batch.sample_ids) == list(range(40))
    for batch in batches:
        tokens, targets, positions, mask, bounds = [], [], [], [], [0]
        for index in batch.sample_ids:
            prompt, response = items[index].prompt_ids, items[index].response_ids
            whole = list(prompt) + list(response)
            for position in range(len(whole) - 1):
                tokens.append(whole[position])
                targets.append(whole[position + 1])
                positions.append(position)
                mask.append(position + 1 >= len(prompt))  # the target is a response token
            bounds.append(len(tokens))
        assert batch.tokens_T.tolist() == tokens and batch.tokens_T.dtype == torch.int64
        assert batch.targets_T.tolist() == targets and batch.targets_T.dtype == torch.int64
        assert batch.positions_T.tolist() == positions and batch.positions_T.dtype == torch.int64
        assert batch.loss_mask_T.tolist() == mask and batch.loss_mask_T.dtype == torch.bool
        assert batch.cu_seqlens.tolist() == bounds and batch.cu_seqlens.dtype == torch.int32
        expected = torch.tensor([items[index].advantage for index in batch.sample_ids])
        assert torch.equal(batch.advantages_S, expected) and batch.advantages_S.dtype == torch.float32
        assert batch.num_tokens <= 64 and batch.num_sequences == len(batch.sample_ids)


def random_groups(rng: random.Random, longest_prompt: int, longest_response: int) -> list[PackItem]:
    """Responses to ten prompts, two of which are equal, in groups of one to nine, and not all in a row."""
    prompts = [[rng.randrange(1000) for _ in range(rng.randint(1, longest_prompt))] for _ in range(10)]
    prompts[7] = list(prompts[2])
    items = [
        PackItem(
            p, [rng.randrange(1000) for _ in range(rng.randint(1, longest_response))], rng.uniform(-2, 2)
        )
        for p in prompts
        for _ in range(rng.randint(1, 9))
    ]
    items[0], items[-1] = items[-1], items[0]
    return items


def of_whole_sequence(batch, n, values_T):
    """A response's per-token values, those of its shared prompt before them."""
    bounds = batch.cu_seqlens.tolist()
    before = batch.shared_prompts[n] if batch.shared_prompts else -1
    places = list(range(bounds[n], bounds[n + 1]))
    if before >= 0:
        places = [*range(bounds[before], bounds[before + 1]), *places]
    return values_T[places].tolist()


@pytest.mark.parametrize(("prompt", "response", "least"), [(30, 10, 0.4), (30, 60, 0.1), (4, 90, 0.0)])
def test_responses_to_a_prompt_share_it_where_that_saves_enough(prompt, response, least):
    items = random_groups(random.Random(3), prompt, response)
    budget = 128
    batches = pack(items, max_tokens=budget, share_prompts=True)
    assert sorted(i for b in batches for i in b.sample_ids if i >= 0) == list(range(len(items)))
    for batch in batches:
        assert batch.num_tokens <= budget and batch.num_sequences == len(batch.sample_ids)
        repeated = 0
        for n, index in enumerate(batch.sample_ids):
            if index < 0:
                assert batch.advantages_S[n] == 0 and n in batch.shared_prompts
                assert not batch.loss_mask_T[batch.cu_seqlens[n] : batch.cu_seqlens[n + 1]].any()
                continue
            prompt_ids, response_ids = list(items[index].prompt_ids), list(items[index].response_ids)
            whole = prompt_ids + response_ids
            assert of_whole_sequence(batch, n, batch.tokens_T) == whole[:-1]
            assert of_whole_sequence(batch, n, batch.targets_T) == whole[1:]
            assert of_whole_sequence(batch, n, batch.positions_T) == list(range(len(whole) - 1))
            counted = [False] * (len(prompt_ids) - 1) + [True] * len(response_ids)
            assert of_whole_sequence(batch, n, batch.loss_mask_T) == counted
            assert batch.advantages_S[n] == torch.tensor(items[index].advantage)
            repeated += len(whole) - 1
        assert repeated <= 4 * budget
    values = unpack(batches, [batch.targets_T for batch in batches], len(items))
    assert [value.tolist() for value in values] == [list(item.response_ids) for item in items]
    plain, used = sum(item.num_positions for item in items), sum(batch.num_tokens for batch in batches)
    assert 1 - used / plain > least or used == plain and not least, (used, plain)


def test_unpack_gives_each_response_its_own_values():
    items = random_items(random.Random(1), 25)
    batches = pack(items, max_tokens=50, min_batches=30)
    values = unpack(batches, [batch.targets_T for batch in batches], len(items))
    assert [value.tolist() for value in values] == [list(item.response_ids) for item in items]
    wide = unpack(batches, [torch.stack([batch.targets_T] * 3, dim=1) for batch in batches], len(items))
    assert wide[4].shape == (len(items[4].response_ids), 3)
    full = [batch for batch in batches if batch.sample_ids[0] >= 0]
    with pytest.raises(ValueError, match="missing"):
        unpack(full[1:], [batch.targets_T for batch in full[1:]], len(items))
    with pytest.raises(ValueError, match="in two batches"):
        unpack(full[:1] * 2, [full[0].targets_T] * 2, len(items))


def test_ranks_with_too_little_get_empty_batches():
    batches = pack([PackItem([1, 2], [3])], max_tokens=8, min_batches=3)
    assert len(batches) == 3 and [batch.sample_ids for batch in batches] == [[0], [-1], [-1]]
    assert pack([], max_tokens=8, min_batches=2)[1].num_tokens == 1
    empty = empty_batch()
    assert (empty.num_tokens, empty.num_sequences) == (1, 1)
    assert empty.loss_mask_T.tolist() == [False] and empty.cu_seqlens.tolist() == [0, 1]
    assert empty.advantages_S.tolist() == [0.0]


def test_sequences_that_do_not_fit_are_named():
    items = [PackItem([1], [2]), PackItem([1] * 6, [2] * 4), PackItem([1] * 8, [2] * 4)]
    with pytest.raises(ValueError, match=r"longer than max_tokens=8: sequence 1 has 9, sequence 2 has 11"):
        pack(items, max_tokens=8)
    with pytest.raises(ValueError, match="sequence 1 has 2 prompt and 0 response tokens"):
        pack([PackItem([1], [2]), PackItem([1, 2], [])], max_tokens=8)
    with pytest.raises(ValueError, match=r"lengths\[1\] is 0"):
        balanced_bins([1, 0], 8)
    with pytest.raises(ValueError, match="min_bins is 0"):
        balanced_bins([1], 8, 0)


def check(lengths: list[int], max_tokens: int, min_bins: int, bins: list[list[int]]) -> None:
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(bin_ and bin_ == sorted(bin_) for bin_ in bins)
    assert bins == sorted(bins)
    assert all(sum(lengths[index] for index in bin_) <= max_tokens for bin_ in bins)
    assert len(bins) >= min(min_bins, len(lengths))


def least_bins(lengths: list[int], max_tokens: int) -> int:
    """The true minimum, by trying every assignment."""
    for count in range(1, len(lengths) + 1):
        for places in itertools.product(range(count), repeat=len(lengths)):
            loads = [0] * count
            for length, place in zip(lengths, places, strict=True):
                loads[place] += length
            if max(loads) <= max_tokens:
                return count
    return 0


def test_number_of_bins_is_close_to_the_least_possible():
    rng = random.Random(2)
    for _ in range(60):
        lengths = [rng.randint(1, 10) for _ in range(rng.randint(1, 6))]
        bins = balanced_bins_python(lengths, 10)
        check(lengths, 10, 1, bins)
        # First-fit-decreasing needs at most 11/9 of the least number and 6/9 (Dosa, 2007).
        assert 9 * len(bins) <= 11 * least_bins(lengths, 10) + 6


def test_bins_are_balanced():
    rng = random.Random(3)
    lengths = [rng.randint(50, 1000) for _ in range(300)]
    bins = balanced_bins(lengths, 8192)
    loads = [sum(lengths[index] for index in bin_) for bin_ in bins]
    # No bin can exceed the lightest by more than a sequence that was put there last, so by the longest.
    assert max(loads) - min(loads) <= 1000
    assert max(loads) / min(loads) < 1.02
    assert balanced_bins([4, 3, 2, 1], 100, 2) == [[0, 3], [1, 2]]
    assert balanced_bins([5, 5], 100, 9) == [[0], [1]]
    assert balanced_bins([], 100, 3) == []


def test_where_the_lightest_bin_overruns_the_budget_first_fit_holds():
    lengths, budget = LPT_OVERRUNS
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    assert packing._lightest_first(lengths, order, budget, 2) is None  # the case is what it says it is
    assert balanced_bins_python(lengths, budget) == [[0, 1], [2, 3, 4]]
    assert balanced_bins(lengths, budget) == [[0, 1], [2, 3, 4]]


def test_levelling_keeps_the_budget_and_fills_empty_bins():
    rng = random.Random(4)
    for _ in range(200):
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(3, 30))]
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        bins = packing._first_fit(lengths, order, 60)
        before = max(sum(lengths[index] for index in bin_) for bin_ in bins)
        bins += [[] for _ in range(min(3, len(lengths) - len(bins)))]
        packing._level(lengths, bins)
        check(lengths, before, 1, sorted(sorted(bin_) for bin_ in bins))


@needs_extension
def test_the_extension_and_its_twin_agree():
    rng = random.Random(5)
    fallbacks = 0
    for trial in range(10_000):
        budget = rng.choice([10, 60, 100, 4096])
        high = rng.choice([budget, max(1, budget // 2), max(1, budget // 8)])
        lengths = [rng.randint(1, high) for _ in range(rng.randint(0, 40))]
        if trial % 3 == 0:  # many ties
            lengths = [max(1, length // 5 * 5) for length in lengths]
        min_bins = rng.choice([1, 1, 2, 5, 50])
        bins = packing._packing.balanced_bins(lengths, budget, min_bins)
        assert bins == balanced_bins_python(lengths, budget, min_bins)
        check(lengths, budget, min_bins, bins)
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        fallbacks += packing._lightest_first(lengths, order, budget, len(bins)) is None
    assert fallbacks > 10  # the rare branch was compared too


@needs_extension
@pytest.mark.parametrize(("lengths", "min_bins"), [([1, 0], 1), ([1, 9], 1), ([1], 0), ([-3], 1)])
def test_the_extension_refuses_what_its_twin_refuses(lengths, min_bins):
    for function in (packing._packing.balanced_bins, balanced_bins_python):
        with pytest.raises(ValueError):
            function(lengths, 8, min_bins)


def test_without_the_extension_python_packs_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(packing, "_packing", None)
    monkeypatch.setattr(packing, "_said", False)
    assert balanced_bins([4, 3, 2, 1], 100, 2) == [[0, 3], [1, 2]]
    assert balanced_bins([4], 100) == [[0]]
    assert caplog.text.count("is not built: packing in Python") == 1
