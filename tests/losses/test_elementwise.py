"""Regression and classification losses against NumPy, SciPy, scikit-learn and torch's own modules, and what all share."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from sklearn import metrics
from sklearn.utils.class_weight import compute_class_weight

from rlhf import losses

N = 12


def data(seed=0, kind="regression", dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, generator=g, dtype=torch.float64) * 2
    grid = torch.randn(N, 4, generator=g, dtype=torch.float64) * 2
    match kind:
        case "regression":
            return x.to(dtype), torch.randn(N, generator=g, dtype=torch.float64).to(dtype)
        case "binary":
            return x.to(dtype), torch.rand(N, generator=g, dtype=torch.float64).round().to(dtype)
        case "probabilities":
            return x.sigmoid().to(dtype), torch.rand(N, generator=g, dtype=torch.float64).to(dtype)
        case "margin":
            return x.to(dtype), (torch.rand(N, generator=g).round() * 2 - 1).to(dtype)
        case "classes":
            return grid.to(dtype), torch.randint(4, (N,), generator=g)
        case "log_probs":
            return grid.log_softmax(-1).to(dtype), torch.randint(4, (N,), generator=g)
        case "soft":
            return grid.to(dtype), torch.randn(N, 4, generator=g, dtype=torch.float64).softmax(-1).to(dtype)
    return grid.softmax(-1).to(dtype), F.one_hot(torch.randint(4, (N,), generator=g), 4).to(dtype)


def softmax(z):
    return special.softmax(z, axis=-1)


def at(p, y):
    return np.take_along_axis(p, y[:, None], -1)[:, 0]


def focal(z, y, alpha, gamma):
    p = special.expit(z)
    return -alpha * y * (1 - p) ** gamma * np.log(p) - (1 - alpha) * (1 - y) * p**gamma * np.log1p(-p)


W = np.array([0.5, 1.0, 2.0, 0.25])
# name: (kind of data, own arguments, the formula in NumPy)
CASES = {
    "mse_loss": ("regression", {}, lambda p, y: (p - y) ** 2),
    "mae_loss": ("regression", {}, lambda p, y: abs(p - y)),
    "huber_loss": ("regression", dict(delta=0.7), lambda p, y: special.huber(0.7, p - y)),
    "smooth_l1_loss": ("regression", dict(beta=0.7), lambda p, y: special.huber(0.7, p - y) / 0.7),
    "log_cosh_loss": ("regression", {}, lambda p, y: np.log(np.cosh(p - y))),
    "quantile_loss": ("regression", dict(quantile=0.8), lambda p, y: np.where(y > p, 0.8 * (y - p), 0.2 * (p - y))),
    "epsilon_insensitive_loss": ("regression", dict(epsilon=0.3), lambda p, y: np.maximum(abs(p - y) - 0.3, 0)),
    "bce_with_logits_loss": ("binary", dict(pos_weight=3.0), lambda z, y: special.softplus(-z) * y * 3 + special.softplus(z) * (1 - y)),
    "bce_loss": ("probabilities", {}, lambda p, y: -special.xlogy(y, p) - special.xlog1py(1 - y, -p)),
    "cross_entropy_loss": ("classes", dict(label_smoothing=0.1), lambda z, y: -0.9 * at(special.log_softmax(z, -1), y) - 0.1 * special.log_softmax(z, -1).mean(-1)),
    "cross_entropy_loss/soft": ("soft", {}, lambda z, q: special.entr(q).sum(-1) + special.rel_entr(q, softmax(z)).sum(-1)),
    "label_smoothing_loss": ("classes", dict(smoothing=0.2), lambda z, y: -0.8 * at(special.log_softmax(z, -1), y) - 0.2 * special.log_softmax(z, -1).mean(-1)),
    "categorical_cross_entropy": ("onehot", {}, lambda p, q: -np.log((p * q).sum(-1))),
    "nll_loss": ("log_probs", {}, lambda lp, y: -at(lp, y)),
    "focal_loss": ("binary", dict(alpha=0.3, gamma=1.5), lambda z, y: focal(z, y, 0.3, 1.5)),
    "multiclass_focal_loss": ("classes", dict(gamma=1.5), lambda z, y: -((1 - at(softmax(z), y)) ** 1.5) * np.log(at(softmax(z), y))),
    "hinge_loss": ("margin", {}, lambda s, y: np.maximum(1 - y * s, 0)),
    "modified_huber_loss": ("margin", {}, lambda s, y: np.where(y * s >= -1, np.maximum(1 - y * s, 0) ** 2, -4 * y * s)),
    "poly1_loss": ("classes", dict(epsilon=2.0), lambda z, y: -np.log(at(softmax(z), y)) + 2 * (1 - at(softmax(z), y))),
}  # fmt: skip


def run(case, *inputs, **options):
    return getattr(losses, case.split("/")[0])(*inputs, **CASES[case][1], **options)


@pytest.mark.parametrize("case", CASES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_formula(case, seed):
    kind, _, formula = CASES[case]
    inputs = data(seed, kind)
    close(run(case, *inputs, reduction="none"), formula(*(t.numpy() for t in inputs)), torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    first, second = data(1, CASES[case][0])
    weight = torch.rand(N, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: run(case, x, second, weight=weight), first.requires_grad_())


@pytest.mark.parametrize("case", CASES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_a_mask_deletes_rows_and_what_they_hold(case, seed):
    first, second = data(seed, CASES[case][0])
    mask = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < 0.6
    if not mask.any():
        return
    want = run(case, first[mask], second[mask])
    hidden = first.clone()
    hidden[~mask] = math.nan
    hidden.requires_grad_()
    got = run(case, hidden, second, mask=mask)
    got.backward()
    close(got.detach(), want, torch.float64)
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("case", CASES)
def test_reductions_permutation_and_the_empty_selection(case):
    first, second = data(2, CASES[case][0])
    each, weight = run(case, first, second, reduction="none"), torch.rand(N, dtype=torch.float64)
    close(run(case, first, second, reduction="sum"), each.sum(), torch.float64)
    close(run(case, first, second), each.sum() / N, torch.float64)
    close(run(case, first, second, weight=weight), (weight * each).sum() / weight.sum(), torch.float64)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    close(run(case, first[order], second[order]), each.mean(), torch.float64)
    first = first.requires_grad_()
    nothing = run(case, first, second, mask=torch.zeros(N, dtype=torch.bool))
    nothing.backward()
    assert nothing == 0 and torch.equal(first.grad, torch.zeros_like(first))


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_computed_in_float32(case):
    inputs = [t.bfloat16() if t.is_floating_point() else t for t in data(3, CASES[case][0])]
    got = run(case, *inputs)
    assert got.dtype == torch.float32
    close(got, run(case, *(t.float() if t.is_floating_point() else t for t in inputs)))


LOGITS = [case for case, (kind, *_) in CASES.items() if kind not in ("probabilities", "onehot", "log_probs")]


@pytest.mark.parametrize("case", LOGITS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_far_inputs_stay_finite_with_finite_gradients(case, size):
    first, second = data(4, CASES[case][0], torch.float32)
    far = (first.sign() * size).requires_grad_()
    loss = run(case, far, second)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(far.grad).all()


def test_huber_and_smooth_l1_differ_by_their_threshold():
    p, y = data(5)
    close(losses.huber_loss(p, y, delta=0.4), 0.4 * losses.smooth_l1_loss(p, y, beta=0.4), torch.float64)
    close(losses.smooth_l1_loss(p, y, beta=0.0), losses.mae_loss(p, y), torch.float64)
    close(losses.quantile_loss(p, y), losses.mae_loss(p, y) / 2, torch.float64)


def test_scikit_learns_metrics():
    p, y = data(6)
    close(losses.mse_loss(p, y), metrics.mean_squared_error(y, p), torch.float64)
    close(losses.mae_loss(p, y), metrics.mean_absolute_error(y, p), torch.float64)
    close(losses.quantile_loss(p, y, 0.3), metrics.mean_pinball_loss(y, p, alpha=0.3), torch.float64)
    z, labels = data(6, "classes")
    want = metrics.log_loss(labels, z.softmax(-1), labels=[0, 1, 2, 3])
    close(losses.cross_entropy_loss(z, labels), want, torch.float64)
    s, signs = data(6, "margin")
    close(losses.hinge_loss(s, signs), metrics.hinge_loss(signs, s), torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_torchs_own_cross_entropy_with_class_weights_and_ignored_labels(smoothing):
    z, y = data(7, "classes")
    y[3] = -100
    w = torch.tensor(W)
    want = F.cross_entropy(z, y, weight=w, label_smoothing=smoothing)
    close(losses.cross_entropy_loss(z, y, class_weights=w, label_smoothing=smoothing), want, torch.float64)
    close(losses.nll_loss(z.log_softmax(-1), y, class_weights=w), F.cross_entropy(z, y, weight=w), torch.float64)
    high = losses.cross_entropy_loss(z.view(3, 4, 4), y.view(3, 4), class_weights=w, label_smoothing=smoothing)
    close(high, want, torch.float64)


def test_focal_without_focus_is_cross_entropy():
    z, y = data(8, "binary")
    close(losses.focal_loss(z, y, alpha=None, gamma=0.0), losses.bce_with_logits_loss(z, y), torch.float64)
    close(losses.focal_loss(z, y, alpha=0.5, gamma=0.0), losses.bce_with_logits_loss(z, y) / 2, torch.float64)
    z, y = data(8, "classes")
    plain = losses.cross_entropy_loss(z, y)
    close(losses.multiclass_focal_loss(z, y, gamma=0.0), plain, torch.float64)
    close(losses.poly1_loss(z, y, epsilon=0.0), plain, torch.float64)


def test_the_two_focal_losses_agree_on_two_classes():
    z, y = data(9, "binary")
    two = torch.stack([torch.zeros_like(z), z], -1)
    got = losses.multiclass_focal_loss(two, y.long(), gamma=2.0, class_weights=torch.tensor([0.75, 0.25]))
    close(got, losses.focal_loss(z, y), torch.float64)


def test_class_weights_are_scikit_learns_when_balanced():
    counts = torch.tensor([5, 20, 75], dtype=torch.float64)
    labels = np.repeat([0, 1, 2], counts.int())
    want = compute_class_weight("balanced", classes=np.array([0, 1, 2]), y=labels)
    close(losses.class_weights(counts), want, torch.float64)
    close(losses.class_weights(counts, "inverse"), 1 / counts, torch.float64)
    effective = (1 - 0.9) / (1 - 0.9**counts)
    close(losses.class_weights(counts, "effective", beta=0.9), effective * 3 / effective.sum(), torch.float64)
    with pytest.raises(ValueError, match=r"counts\[1\] is 0"):
        losses.class_weights(torch.tensor([3, 0]))


Z, Y = torch.zeros(2), torch.zeros(2)
MISTAKES = {
    "a silent broadcast": (lambda: losses.mse_loss(torch.zeros(3, 1), torch.zeros(3)), r"predictions \(3, 1\), targets \(3,\)"),
    "integer predictions": (lambda: losses.mse_loss(torch.zeros(2, dtype=torch.int64), Y), "predictions must be floating point"),
    "a negative delta": (lambda: losses.huber_loss(Z, Y, delta=-1.0), "delta must be in"),
    "logits where probabilities belong": (lambda: losses.bce_loss(Z + 3, Y), "probabilities must be probabilities in"),
    "targets of -1 for BCE": (lambda: losses.bce_with_logits_loss(Z, Y - 1), "targets must be probabilities in"),
    "labels of 0 and 1 for hinge": (lambda: losses.hinge_loss(Z + 1, Y), "pass 2 \\* targets - 1"),
    "float indices": (lambda: losses.cross_entropy_loss(torch.zeros(2, 3), Y), "class indices"),
    "an index too large": (lambda: losses.cross_entropy_loss(torch.zeros(1, 3), torch.tensor([3])), r"targets\[0\] is 3, outside"),
    "one-hot for focal": (lambda: losses.multiclass_focal_loss(torch.zeros(2, 3), torch.zeros(2, 3)), "class indices"),
    "logits as soft targets": (lambda: losses.cross_entropy_loss(torch.zeros(1, 3), torch.tensor([[2.0, -1.0, 0.0]])), "from -1 to 2"),
    "an odd shape": (lambda: losses.cross_entropy_loss(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)), "targets must be indices of shape"),
    "an unknown scheme": (lambda: losses.class_weights(torch.ones(2), "log"), "scheme must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case):
    wrong, said = MISTAKES[case]
    with pytest.raises(ValueError, match=said):
        wrong()
