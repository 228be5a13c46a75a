"""Selective checkpointing: no number changes, and attention and projections are not computed twice."""

import copy

import pytest
import torch
from conftest import close, tiny_model
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from rlhf.data import Collator
from rlhf.kernels import optimize
from rlhf.logprobs import TokenLoss
from rlhf.models import Policy, use_segments
from rlhf.models.activations import checkpoint_arguments

SUM = TokenLoss(lambda scores: -scores.logps)
ROWS = [
    {"prompt_ids": [5, 3, 4, 9], "chosen_ids": [6, 7, 3, 2], "rejected_ids": [2, 4, 6]},
    {"prompt_ids": [2, 8], "chosen_ids": [3, 4], "rejected_ids": [7, 1, 1, 5, 9]},
]


def run(model, layout, **kwargs):
    policy = Policy(copy.deepcopy(model)).train()
    if kwargs:
        policy.activation_checkpointing_enable(kwargs)
    with FlopCounterMode(display=False) as counter:
        policy(Collator(layout=layout)(ROWS), SUM).loss.backward()
    gradients = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return gradients, counter.get_total_flops()


@pytest.mark.parametrize("layout", ["segments", "rows"])
@pytest.mark.parametrize("peft", [False, True])
def test_gradients_stay_and_only_wide_products_are_recomputed(peft, layout):
    model = tiny_model()
    if peft:
        targets = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, targets)
    optimize(model)
    if layout == "segments":
        assert use_segments(model) is None
    want, least = run(model, layout)
    got, selective = run(model, layout, selective=True)
    _, most = run(model, layout, use_reentrant=False)
    assert got.keys() == want.keys() and len(got) > 10
    for name, gradient in want.items():
        close(got[name], gradient)
    assert least < selective < most
    if not peft:
        # Of a layer's products of 32 x (32 + 16 + 16 + 32) and 3 x 32 x 64, the two into the MLP are recomputed.
        tokens = Collator(layout=layout)(ROWS).input_ids.numel()
        assert selective - least == 2 * tokens * 2 * (2 * 32 * 64)


def test_the_reentrant_kind_is_refused():
    with pytest.raises(ValueError, match='"selective" needs "use_reentrant": false'):
        checkpoint_arguments({"selective": True, "use_reentrant": True})
    assert checkpoint_arguments({"use_reentrant": True}) == {"use_reentrant": True}


def test_a_result_that_is_changed_in_place_would_be_noticed():
    weight = torch.randn(4, 4, requires_grad=True)

    def in_place(inputs):
        return (inputs @ weight).add_(1).sin()

    output = torch.utils.checkpoint.checkpoint(
        in_place, torch.randn(2, 4, requires_grad=True), **checkpoint_arguments({"selective": True})
    )
    with pytest.raises(RuntimeError, match="mutated"):
        output.sum().backward()
