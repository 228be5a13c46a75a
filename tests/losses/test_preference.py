"""Preference losses against their formulas in Python floats, numerical gradients and scikit-learn."""

import math

import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import hinge_loss as sklearn_hinge
from sklearn.metrics import log_loss

from rlhf.losses import PREFERENCE_LOSSES, checks, dpo_loss, ipo_loss, sigmoid_loss

PLAIN = {
    "sigmoid": lambda beta, delta: math.log1p(math.exp(-beta * delta)),
    "hinge": lambda beta, delta: max(0.0, 1 - beta * delta),
    "ipo": lambda beta, delta: (delta - 1 / (2 * beta)) ** 2,
}
AT_START = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 25.0}  # policy = reference, beta 0.1


def pairs(seed=0, count=6):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=g, dtype=torch.float64) * 5 - 20 for _ in range(4)]


def delta(chosen, rejected, ref_chosen, ref_rejected):
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def test_every_loss_has_a_formula_here():
    assert set(PLAIN) == set(PREFERENCE_LOSSES) == set(AT_START)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@given(seed=st.integers(0, 10_000), beta=st.floats(0.01, 2), smoothing=st.floats(0, 0.49))
@settings(max_examples=20, deadline=None)
def test_formula(name, seed, beta, smoothing):
    data = pairs(seed)
    plain = PLAIN[name]
    want = [(1 - smoothing) * plain(beta, d) + smoothing * plain(beta, -d) for d in delta(*data).tolist()]
    got = PREFERENCE_LOSSES[name](*data, beta, label_smoothing=smoothing, reduction="none")
    close(got, torch.tensor(want, dtype=torch.float64), torch.float64)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_gradcheck(name):
    data = [t.requires_grad_(i < 2) for i, t in enumerate(pairs(1, 4))]
    weight = torch.rand(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda c, r: PREFERENCE_LOSSES[name](c, r, *data[2:], 0.3, label_smoothing=0.1, weight=weight), data[:2]
    )


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_policy_equal_to_reference(name):
    z = torch.randn(5)
    close(dpo_loss(z, -z, z, -z, loss_type=name), AT_START[name])


def test_sigmoid_is_logistic_regression_on_margins():
    data = pairs(2)
    p = torch.sigmoid(0.1 * delta(*data)).numpy()
    close(sigmoid_loss(*data), log_loss([1] * 6, [[1 - q, q] for q in p], labels=[0, 1]), torch.float64)


def test_hinge_is_scikit_learns():
    data = pairs(3)
    margins = (0.1 * delta(*data)).numpy()
    want = (
        sklearn_hinge([1] * 6 + [-1], [*margins, -2.0]) * 7 / 6
    )  # one settled negative: scikit-learn wants two classes
    close(dpo_loss(*data, loss_type="hinge"), want, torch.float64)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_index_form_is_the_pair_form(name):
    policy, ref = pairs(4)[:2]
    chosen, rejected = torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5])
    want = dpo_loss(policy[chosen], policy[rejected], ref[chosen], ref[rejected], 0.2, loss_type=name)
    assert torch.equal(dpo_loss(policy, ref, chosen, rejected, 0.2, loss_type=name), want)
    by_name = dict(policy_logps=policy, ref_logps=ref, yw_idx=chosen, yl_idx=rejected, beta=0.2)
    assert torch.equal(dpo_loss(**by_name, loss_type=name), want)


def test_ipo_averages_over_lengths_when_they_are_given():
    data = pairs(5)
    lengths = torch.tensor([3, 1, 4, 1, 5, 9]), torch.tensor([2, 6, 5, 3, 5, 8])
    averaged = [t / lengths[i % 2] for i, t in enumerate(data)]
    got = ipo_loss(*data, chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    close(got, ipo_loss(*averaged), torch.float64)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_mask_is_selection_and_hides_what_is_not_finite(name):
    data = pairs(6)
    mask = torch.tensor([True, False, True, True, False, True])
    want = dpo_loss(*(t[mask] for t in data), loss_type=name)
    data[0][1] = math.nan
    close(dpo_loss(*data, loss_type=name, mask=mask), want, torch.float64)


def test_extreme_margins_stay_finite():
    far = torch.tensor([1e4, -1e4])
    z = torch.zeros(2)
    assert torch.isfinite(sigmoid_loss(far, z, z, z, 1.0)).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(beta=0.0), "beta must be in"),
        (dict(label_smoothing=0.5), "label_smoothing must be in"),
        (dict(loss_type="dpo"), "loss_type must be one of sigmoid"),
        (dict(mask=torch.ones(2, dtype=torch.bool)), r"values \(3,\), mask \(2,\)"),
    ],
)
def test_bad_arguments_are_named(changes, said):
    z = torch.zeros(3)
    with pytest.raises(ValueError, match=said):
        dpo_loss(z, z, z, z, **changes)


def test_nan_is_found_on_request():
    z = torch.tensor([math.nan])
    with checks(), pytest.raises(ValueError, match="policy_chosen holds NaN"):
        dpo_loss(z, z, z, z)
