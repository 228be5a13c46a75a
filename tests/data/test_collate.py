"""Numbers that travel with a batch: stacked in the order of its sequences and targets, and moved with it."""

from dataclasses import replace

import pytest
import torch

from rlhf.data import Collator
from rlhf.data.collate import SequenceColumn

PAIR = {"prompt_ids": [5, 3], "chosen_ids": [6, 7], "rejected_ids": [2]}


@pytest.mark.parametrize("layout", ["rows", "segments"])
def test_columns_have_a_number_for_each_sequence(layout):
    first = PAIR | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0, "margin": 3}
    second = PAIR | {"ref_chosen_logps": -4.0, "ref_rejected_logps": -5.0, "margin": 0.5}
    batch = Collator(layout=layout)([{"examples": [first, second]}])
    assert batch.per_sequence["ref_logps"].tolist() == [-1, -2, -4, -5]
    assert batch.per_sequence["margin"].tolist() == [3, 3, 0.5, 0.5]
    assert batch.per_sequence["margin"].dtype == torch.float32
    group = {"prompt_ids": [1], "completions": [[2], [3], [4]], "length": 7}
    column = SequenceColumn("length", ("length",), torch.int64)
    assert Collator(layout=layout, per_sequence=(column,))([group]).per_sequence["length"].tolist() == [7, 7, 7]
    assert Collator(layout=layout)([PAIR]).per_sequence == {}


def test_everything_of_a_batch_moves_with_it():
    collate = Collator(extras={"again": lambda rows, collator: Collator()(rows), "none": lambda rows, collator: None})
    batch = replace(collate([PAIR | {"margin": 1.0}]), per_token={"advantages": torch.ones(3)})
    moved = batch.to("meta")
    tensors = [moved.input_ids, moved.targets.token, moved.per_token["advantages"], moved.per_sequence["margin"]]
    tensors.append(moved.extras["again"].per_sequence["margin"])
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.extras.keys() == {"again"}


def test_a_column_of_another_length_is_named():
    batch = Collator()([PAIR])
    with pytest.raises(ValueError, match=r"per_token\['advantages'\] has 2 values, the batch has 3 scored tokens"):
        replace(batch, per_token={"advantages": torch.ones(2)})
    with pytest.raises(ValueError, match=r"per_sequence\['margin'\] has 1 values, the batch has 2 sequences"):
        replace(batch, per_sequence={"margin": torch.ones(1)})
