"""Targets by their definition: a double loop over rows and positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.logprobs import Targets


def as_list(targets):
    return list(zip(targets.source.tolist(), targets.token.tolist(), targets.sequence.tolist(), strict=True))


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_every_way_to_build_them_agrees(data):
    side = data.draw(st.sampled_from(["left", "right"]))
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4))
    width = max(max(p + c for p, c in lengths), 1) + data.draw(st.integers(0, 2))
    ids = torch.randint(9, (len(lengths), width), generator=torch.Generator().manual_seed(len(lengths)))
    labels, attention = torch.full_like(ids, -100), torch.zeros_like(ids)
    want = []
    for row, (prompt, completion) in enumerate(lengths):
        start = width - prompt - completion if side == "left" else 0
        attention[row, start : start + prompt + completion] = 1
        for column in range(start + prompt, start + prompt + completion):
            labels[row, column] = ids[row, column]
            if column > start:  # the first token of a row has nothing before it
                want.append((row * width + column - 1, int(ids[row, column]), row))
    prompts, completions = (torch.tensor(n) for n in zip(*lengths, strict=True))
    built = [
        Targets.from_labels(labels, attention),
        Targets.from_mask(ids, labels != -100, attention),
        Targets.from_lengths(ids, prompts, completions, side),
    ]
    assert all(as_list(targets) == want and targets.num_sequences == len(lengths) for targets in built)


def test_sums_and_counts_keep_empty_sequences():
    targets = Targets(torch.tensor([0, 1, 5]), torch.tensor([1, 1, 1]), torch.tensor([0, 0, 2]), num_sequences=4)
    assert targets.counts().tolist() == [2, 0, 1, 0]
    assert targets.sum(torch.tensor([1.0, 2.0, 4.0])).tolist() == [3.0, 0.0, 4.0, 0.0]


def test_other_ignore_index():
    assert as_list(Targets.from_labels(torch.tensor([[5, -1, 7]]), ignore_index=-1)) == [(1, 7, 0)]


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"labels must be \[batch, seq\], got \(3,\)"):
        Targets.from_labels(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="row 1 has prompt \\+ completion = 5 tokens, input_ids only 4"):
        Targets.from_lengths(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([1, 2]), torch.tensor([1, 3]))
    with pytest.raises(ValueError, match=r"Targets.token must be int64 \[2\]"):
        Targets(torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))
