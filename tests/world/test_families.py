"""Families of models whose configs or positions are not Llama's train as a plain loop trains them.

huggingface/transformers#36683, axolotl-ai-cloud/axolotl#2874, volcengine/verl#1013: configs in parts (Gemma 3).
huggingface/transformers#46773: recurrent layers read padding. RWKV's generate forgets what it has read.
"""

import logging

import pytest
import torch
from world.families import FAMILIES, UNABLE, Found, examine, tiny_family

from rlhf.data import Collator
from rlhf.models import Policy
from rlhf.models.positions import finds_own_positions, first_position, inputs_of

SOME = ["roberta", "bart", "openai-gpt", "gemma3", "rwkv"]


def check(found: Found) -> None:
    wrong = {name: value for name, value in found._asdict().items() if isinstance(value, float) and value > 1e-4}
    failed = {name: getattr(found, name) for name in Found.COMPARED if isinstance(getattr(found, name), str)}
    assert not wrong and not failed


@pytest.mark.parametrize("family", SOME)
def test_runs_are_those_of_a_plain_loop(family):
    check(examine(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in {*SOME, *UNABLE}])
def test_every_family(family):
    check(examine(family))


@pytest.mark.parametrize(
    ("family", "own", "first"), [("roberta", True, 1), ("opt", False, None), ("gpt2", False, None)]
)
def test_positions_begin_where_the_model_says(family, own, first):
    """RoBERTa's begin after the row of its padding; 0, 1, 2, … were written over them in silence."""
    model = tiny_family(family)
    assert finds_own_positions(model) == own
    assert first_position(model) == first or not own
    batch = Collator()([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    assert ("position_ids" in inputs_of(model, batch)) != own


def test_a_model_that_sees_ahead_is_told(caplog):
    with caplog.at_level(logging.WARNING, "rlhf"):
        for changes in ({"is_decoder": False}, {}):
            caplog.clear()
            Policy(tiny_family("bert", **changes))
            assert ("sees the tokens that it is to predict" in caplog.text) == bool(changes)


def test_positions_are_checked_without_dropout():
    torch.manual_seed(0)
    model = tiny_family("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    policy = Policy(model)
    assert not finds_own_positions(model) and policy.model.training
