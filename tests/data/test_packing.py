"""Bins against the textbook's loop and the true optimum; packed rows against the rows."""

import logging
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from random import Random

import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf.data import Collator, Packed, best_fit_decreasing
from rlhf.data.packing import hash_of_tokens, num_tokens

lengths_and_capacity = st.tuples(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 50))
few = st.tuples(st.lists(st.integers(1, 20), max_size=8), st.integers(20, 30))


def by_the_book(lengths, capacity):
    """Best fit decreasing as it is defined: look at every bin for every item."""
    bins, full = [], []
    for item in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        fits = [b for b in range(len(bins)) if full[b] + lengths[item] <= capacity]
        if fits:
            best = max(fits, key=lambda b: full[b])  # the first of the fullest
            bins[best].append(item)
            full[best] += lengths[item]
        else:
            bins.append([item])
            full.append(lengths[item])
    return bins


def fewest_bins(lengths, capacity):
    """The optimum, over all subsets: (bins closed, what is in the open one) for each."""
    best = {0: (0, capacity)}
    for subset in range(1, 1 << len(lengths)):
        found = []
        for item, length in enumerate(lengths):
            if subset >> item & 1:
                bins, full = best[subset ^ (1 << item)]
                found.append((bins, full + length) if full + length <= capacity else (bins + 1, length))
        best[subset] = min(found)
    return best[(1 << len(lengths)) - 1][0]


@given(lengths_and_capacity)
def test_bins_are_those_of_the_book(case):
    assert best_fit_decreasing(*case) == by_the_book(*case)


@given(lengths_and_capacity)
def test_every_item_has_one_place_and_no_bin_overflows(case):
    lengths, capacity = case
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(item for group in bins for item in group) == list(range(len(lengths)))
    for group in bins:
        assert sum(lengths[i] for i in group) <= capacity or len(group) == 1
    # No two could have been one: an item opens a bin only where it fits in none.
    sizes = sorted(sum(lengths[i] for i in group) for group in bins)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > capacity
    assert bins == best_fit_decreasing(list(lengths), capacity)


@given(few)
def test_few_bins_against_the_optimum(case):
    assert len(best_fit_decreasing(*case)) <= Fraction(11, 9) * fewest_bins(*case) + 1


@given(st.lists(st.lists(st.integers(1, 99), max_size=7, unique=True), min_size=1, max_size=40), st.randoms())
@example([[51, 77]] * 40, Random(0))  # halves must not come last
def test_many_bins_against_the_optimum(cuts, random):
    """Full bins, cut and shuffled: the optimum is their number."""
    lengths = []
    for places in cuts:
        edges = [0, *sorted(places), 100]
        lengths += [b - a for a, b in pairwise(edges)]
    random.shuffle(lengths)
    assert len(cuts) <= len(best_fit_decreasing(lengths, 100)) <= Fraction(11, 9) * len(cuts) + 1


def test_a_worked_example():
    assert best_fit_decreasing([2, 5, 4, 7, 1, 3, 8], 10) == [[6, 0], [3, 5], [1, 2, 4]]
    assert best_fit_decreasing([3, 12, 3], 6) == [[1], [0, 2]]  # 12 is larger than a bin
    assert best_fit_decreasing([], 6) == []


SFT = [{"input_ids": list(range(n)), "labels": [-100] * (n // 2) + list(range(n // 2, n))} for n in (5, 3, 9, 2, 7, 4)]
PAIRS = [
    {"prompt_ids": [1] * p, "chosen_ids": [2] * c, "rejected_ids": [3] * r}
    for p, c, r in ((3, 2, 4), (0, 1, 1), (5, 5, 1), (2, 8, 3), (1, 1, 0))
]


@pytest.mark.parametrize(("rows", "want"), [(SFT, [5, 3, 9, 2, 7, 4]), (PAIRS, [9, 2, 11, 13, 2])], ids=["sft", "dpo"])
def test_tokens_of_a_row_count_its_prompt_once(rows, want):
    dataset = Dataset.from_list(rows)
    assert num_tokens(dataset).tolist() == want
    # A view of some rows, in another order, and columns that hold no tokens.
    chosen = dataset.add_column("ref_chosen_logps", [0.5] * len(rows)).select([4, 1, 2])
    assert num_tokens(chosen).tolist() == [want[i] for i in (4, 1, 2)]


@pytest.mark.parametrize("rows", [SFT, PAIRS], ids=["sft", "dpo"])
def test_each_row_is_packed_once_and_whole(rows, caplog):
    with caplog.at_level(logging.INFO):
        packed = Packed(Dataset.from_list(rows), 13)
    found = [example for item in range(len(packed)) for example in packed[item]["examples"]]
    assert Counter(map(str, found)) == Counter(map(str, rows))
    assert len(packed) < len(rows)
    for item in range(len(packed)):
        count = [num_tokens(Dataset.from_list([row]))[0] for row in packed[item]["examples"]]
        assert sum(count) <= 13
    assert f"packed {len(rows)} rows into {len(packed)} of at most 13 tokens" in caplog.text
    assert "longer than" not in caplog.text


def test_rows_that_are_too_long_are_told(caplog):
    packed = Packed(Dataset.from_list(SFT), 6)
    assert sorted(len(packed[i]["examples"]) for i in range(len(packed))) == [1, 1, 1, 1, 2]
    assert "2 of 6 rows are longer than the 6 tokens of a batch (up to 9): each is a batch by itself" in caplog.text


token = st.integers(0, 9)
sft_row = st.lists(st.tuples(token, st.booleans()), min_size=1, max_size=6).map(
    lambda row: {"input_ids": [t for t, _ in row], "labels": [t if scored else -100 for t, scored in row]}
)
pair = st.fixed_dictionaries(
    {name: st.lists(token, max_size=5) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
).filter(lambda row: any(row.values()))


@settings(deadline=None)
@given(st.one_of(st.lists(sft_row, min_size=1, max_size=5), st.lists(pair, min_size=1, max_size=5)))
def test_all_layouts_score_the_same_tokens_from_the_same_places(rows):
    """And a packed item is laid out as its rows are."""
    packed = [{"examples": rows[:2]}, *({"examples": [row]} for row in rows[2:])]
    want, *others = (
        Collator(9, layout="rows")(rows),
        Collator(9, padding_side="left")(rows),
        Collator(layout="segments")(rows),
        Collator(layout="segments")(packed),
    )
    for got in others:
        assert got.targets.num_sequences == want.targets.num_sequences
        assert torch.equal(got.targets.token, want.targets.token)
        assert torch.equal(got.targets.sequence, want.targets.sequence)
        for name in ("input_ids", "position_ids"):
            ours, theirs = (getattr(b, name).flatten()[b.targets.source] for b in (got, want))
            assert torch.equal(ours, theirs)
        assert got.num_tokens() == want.num_tokens()
    flat = others[1]
    assert flat.input_ids.numel() == sum(span.length for span in flat.segments.spans) == num_tokens_of(rows)


def num_tokens_of(rows):
    return sum(len(ids) for row in rows for name, ids in row.items() if name != "labels")


def test_ids_of_prompts_that_are_all_empty_are_hashed():
    """Of pairs without a common prompt: the list has no type of its items, and reading rows twice failed."""
    rows = [Dataset.from_dict({"prompt_ids": [[]] * count, "chosen_ids": [[1]] * count}) for count in (2, 3)]
    hashes = [hash_of_tokens(each, ("prompt_ids", "chosen_ids")) for each in rows]
    assert hashes[0] != hashes[1]
