"""The classic mistakes become readable, and a loss that is stuck is explained."""

import math
import warnings

import pytest
import torch
from torch import nn

from rlhf import losses

G = torch.Generator().manual_seed(0)
Z, LABELS = torch.randn(16, 4, generator=G), torch.randint(4, (16,), generator=G)
BINARY, ZEROS = torch.randn(200, generator=G), torch.zeros(200)
RARE = ZEROS.clone()
RARE[:4] = 1
MISTAKES = {
    "a sigmoid twice": (lambda: losses.bce_with_logits_loss(BINARY.sigmoid(), RARE, pos_weight=9.0), "was a sigmoid applied"),
    "a sigmoid before focal": (lambda: losses.focal_loss(BINARY.sigmoid(), RARE), "was a sigmoid applied"),
    "continuous targets": (lambda: losses.bce_with_logits_loss(BINARY, torch.rand(200)), "use a regression loss"),
    "labels for a regression": (lambda: losses.mse_loss(BINARY, RARE), "for labels use bce_with_logits_loss"),
    "NaN in the inputs": (lambda: losses.mse_loss(torch.tensor([0.0, math.nan]), torch.ones(2)), r"predictions\[1\] is nan"),
    "infinity in the targets": (lambda: losses.mse_loss(torch.ones(2), torch.tensor([-math.inf, 0.0])), r"targets\[0\] is -inf"),
    "log of 0": (lambda: losses.mse_loss(torch.zeros(3).log(), torch.ones(3)), r"predictions\[0\] is -inf"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_an_error_or_a_warning_on_request(case):
    wrong, said = MISTAKES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrong()  # not looked for by default
    with losses.checks(), pytest.raises(ValueError, match=said):
        wrong()
    with losses.checks.warn(), pytest.warns(UserWarning, match=said):
        wrong()


def test_sums_over_batches_of_different_sizes():
    with losses.checks.warn(), pytest.warns(UserWarning, match="summed over 9 elements after 16"):
        losses.mse_loss(Z[:, 0], Z[:, 1], reduction="sum")
        losses.mse_loss(Z[:9, 0], Z[:9, 1], reduction="sum")


def test_good_inputs_pass():
    with losses.checks():
        losses.bce_with_logits_loss(BINARY, RARE, pos_weight=49.0)
        losses.cross_entropy_loss(Z, LABELS)
        losses.mse_loss(Z[:, 0], Z[:, 1])
        losses.focal_loss(BINARY, RARE)


def test_checks_end_with_their_context():
    with losses.checks():
        pass
    losses.mse_loss(torch.tensor([math.nan]), torch.ones(1))


def trained(scale=1.0):
    model = nn.Linear(4, 4)
    loss = losses.cross_entropy_loss(model(Z) * scale, LABELS)
    loss.backward()
    return model, loss


EXPLAINED = {
    "an input that is no number": (lambda: losses.explain(torch.tensor(math.nan), inputs={"logits": torch.tensor([1.0, math.inf])}), "logits[1] is inf"),
    "nothing scored": (lambda: losses.explain(torch.tensor(0.0), inputs={"labels": torch.full((3,), -100)}), "nothing is scored"),
    "nothing masked in": (lambda: losses.explain(torch.tensor(0.0), inputs={"mask": torch.zeros(3, dtype=torch.bool)}), "nothing counts"),
    "detached": (lambda: losses.explain(torch.tensor(1.0)), "the loss has no gradient"),
    "frozen": (lambda: losses.explain([1.0], model=nn.Linear(2, 2).requires_grad_(False)), "the model is frozen"),
    "broken weights": (lambda: losses.explain([1.0], model=broken()), "parameter weight holds NaN"),
    "a large gradient": (lambda: losses.explain(trained(1e6)[1], model=_keep(1e6)), "clip it"),
    "diverged": (lambda: losses.explain([2.0, 3.0, math.nan]), "the loss is nan since step 3"),
    "no step": (lambda: losses.explain([1.0] * 5), "is optimizer.step() called"),
    "growing": (lambda: losses.explain([1.0, 1.2, 1.5, 2.0]), "the loss grows"),
    "jumping": (lambda: losses.explain([2.0, 1.0, 2.0, 1.0, 2.0, 1.0]), "jumps up and down"),
    "guessing": (lambda: losses.explain([1.387, 1.386, 1.388, 1.386], num_classes=4), "that of a guess"),
    "slow": (lambda: losses.explain([3.0, 2.999, 2.998, 2.997]), "hardly falls"),
}  # fmt: skip


def test_an_input_that_is_nan_comes_before_others():
    logits = torch.tensor([0.5, math.nan])
    reasons = losses.explain(torch.tensor(math.nan), inputs={"targets": torch.ones(2), "logits": logits})
    assert reasons[0].startswith("logits[1] is nan: the loss cannot be a number; look for 0/0 or inf - inf")
    assert (
        reasons[1] == "targets is the same everywhere (1): this batch has one class or one value, so shuffle the data"
    )


CONSTANT = {"targets": 1.0, "labels": 2, "y": 0.0, "weight": 1.0, "attention_mask": 1, "class_weights": 1.0}


def test_only_what_a_model_may_have_computed_is_called_a_dead_layer():
    for name, value in CONSTANT.items():
        reasons = losses.explain([1.0], inputs={name: torch.full((4,), value)})
        assert "dead layer" not in " ".join(reasons) and bool(reasons) == (name in ("targets", "labels", "y"))
    (reason,) = losses.explain([1.0], inputs={"logits": torch.zeros(4)})
    assert "look for a dead layer" in reason
    with pytest.raises(ValueError, match="targets must be a torch"):
        losses.explain([1.0], inputs={"targets": [1.0, 1.0]})


def broken():
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, math.nan)
    return model


def _keep(scale):
    return trained(scale)[0]


@pytest.mark.parametrize("case", EXPLAINED)
def test_explanations(case):
    explain, said = EXPLAINED[case]
    reasons = explain()
    assert reasons and said in reasons[0]


def test_nothing_wrong_is_said_of_a_good_run():
    model, loss = trained()
    assert losses.explain(loss, inputs={"logits": Z, "labels": LABELS}, model=model) == []
    assert losses.explain([3.0, 2.5, 2.2, 2.0, 1.9]) == []
