"""The collator plans a row's spans in tensors, which travel to the device with the batch."""

import itertools
from dataclasses import fields, is_dataclass

import pytest
import torch
from torch.utils.data import DataLoader

from rlhf.data import Collator
from rlhf.data.segments import Segments, Span

PAIRS = [
    {"prompt_ids": [5, 3, 4], "chosen_ids": [6, 7, 3, 2], "rejected_ids": [2, 4, 6], "margin": 0.5},
    {"prompt_ids": [2], "chosen_ids": [3, 4], "rejected_ids": [7], "margin": 0.1},
    {"prompt_ids": [], "chosen_ids": [3], "rejected_ids": [7, 2], "margin": 0.2},
]
ROWS = [{"input_ids": list(range(1, length)), "labels": list(range(1, length))} for length in (3, 9, 2)]


def tensors_in(value, name="batch"):
    """All tensors of a batch, by the path to them."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if not isinstance(value, dict):
        return {}
    return {path: tensor for key, part in value.items() for path, tensor in tensors_in(part, f"{name}.{key}").items()}


@pytest.mark.parametrize("rows", [PAIRS, ROWS], ids=["pairs", "rows"])
def test_the_layout_is_that_of_the_spans(rows):
    segments = Collator(layout="segments")(rows).segments
    spans, layout = segments.spans, segments.layout
    starts = [0, *itertools.accumulate(span.length for span in spans)]
    keys = [
        [*range(starts[parent], starts[parent] + prefix), *range(start, start + length)]
        for start, (length, parent, prefix) in zip(starts, spans, strict=False)
    ]
    assert layout.query_starts.tolist() == starts
    assert layout.key_starts.tolist() == [0, *itertools.accumulate(map(len, keys))]
    assert (layout.longest_query, layout.longest_key) == (max(span.length for span in spans), max(map(len, keys)))
    if rows is ROWS:
        assert layout.key_rows is None  # the row as it is: no key is copied
    else:
        assert layout.key_rows.tolist() == list(itertools.chain(*keys))
    assert [layout.prefix_starts[i] for i, span in enumerate(spans) if span.prefix] == [
        starts[span.parent] for span in spans if span.prefix
    ]
    assert segments.last_rows().tolist() == [start - 1 for start in starts[1:]]


def test_an_empty_span_has_its_place():
    segments = Segments.of((Span(3), Span(0, 0, 2), Span(0), Span(2)))
    assert segments.layout.query_starts.tolist() == [0, 3, 3, 3, 5]
    assert segments.layout.key_rows.tolist() == [0, 1, 2, 0, 1, 3, 4]


def test_an_empty_answer_ends_where_its_prompt_does():
    """A reward model would read its reward off the other answer."""
    rows = [{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": []}, PAIRS[1]]
    found = []
    for layout in ("segments", "rows"):
        batch = Collator(layout=layout)(rows)
        found.append(batch.input_ids.flatten()[batch.last()].tolist())
    assert found[0] == found[1] == [9, 7, 4, 7]


def test_every_tensor_moves_and_is_pinned(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(1) or self.clone())
    mismatched = [row | {"mismatched": [[3, 4], [5]], "mismatched_labels": [[3, 4], [5]]} for row in PAIRS[:1]]
    batch = Collator(layout="segments")(mismatched)
    before = tensors_in(batch)
    assert {"batch.segments.layout.key_rows", "batch.extras.mismatched.segments.layout.query_starts"} <= set(before)
    copy = tensors_in(batch.pin_memory())
    assert len(pinned) == len(before) == len(copy)
    for name, tensor in before.items():
        assert copy[name] is not tensor and torch.equal(copy[name], tensor)
    assert {tensor.device.type for tensor in tensors_in(batch.to("meta")).values()} == {"meta"}


def test_workers_plan_too():
    loader = DataLoader(PAIRS, batch_size=2, collate_fn=Collator(layout="segments"), num_workers=1)
    (batch, _), here = list(loader), Collator(layout="segments")(PAIRS[:2])
    for name, tensor in tensors_in(here).items():
        assert torch.equal(tensors_in(batch)[name], tensor)
    assert batch.segments.spans == here.segments.spans
