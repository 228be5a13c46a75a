"""Estimators of scikit-learn are minimisers of our losses: same data, same penalty, same coefficients.

The table is that of docs/scikit-learn.md. The closed-form and full-batch solvers agree to 1e-4; SGD's estimators wander
around the minimum with their last steps and are compared at 2 % of the coefficients' length.
"""

import numpy as np
import pytest
import torch
from sklearn import linear_model

from rlhf import losses

G = np.random.default_rng(0)
X = G.normal(size=(300, 3))
LINE = X @ [1.5, -2.0, 0.5] + 0.7 + G.normal(size=300) * 0.3
LINE[::25] += 6  # outliers, which set the robust ones apart
SIGN = (X @ [2.0, -1.0, 0.5] + 0.3 + G.normal(size=300) > 0).astype(float)
# One class in ten, and three classes of different sizes.
RARE = (X @ [2.0, -1.0, 0.5] - 3.2 + G.normal(size=300) > 0).astype(float)
THREE = np.digitize(X @ [1.0, -1.0, 0.5] + G.normal(size=300), [0.5, 2.0])
N = len(X)


def minimise(objective):
    """Coefficients and intercept that minimise ``objective(scores, w, extra)``; LBFGS in float64, then polished."""
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    extra = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b, extra], max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe")  # fmt: skip
    inputs = torch.as_tensor(X)

    def closure():
        optimizer.zero_grad()
        value = objective(inputs @ w + b, w, extra)
        value.backward()
        return value

    optimizer.step(closure)
    return np.append(w.detach().numpy(), b.item())


Y, S01 = torch.as_tensor(LINE), torch.as_tensor(SIGN)
S = 2 * S01 - 1
R01 = torch.as_tensor(RARE)
BALANCED = losses.class_weights(R01.long().bincount().double())
ALPHA = 1e-3
SGD = dict(
    alpha=ALPHA,
    max_iter=1500,
    tol=None,
    random_state=0,
    learning_rate="invscaling",
    eta0=0.5,
    power_t=0.6,
    average=100,
)


def half(w):
    return (w**2).sum() / 2


def huber(scores, w, log_sigma):
    """HuberRegressor: the scale is estimated with the line; its loss is sigma * (1 + huber) with slope 2 * epsilon."""
    sigma = log_sigma.exp()
    return (
        N * sigma
        + 2 * sigma * losses.huber_loss(scores / sigma, Y / sigma, 1.35, reduction="sum")
        + ALPHA * (w**2).sum()
    )


# estimator: (labels, objective, relative tolerance)
TABLE = {
    "LinearRegression": (linear_model.LinearRegression(), LINE, lambda z, w, _: losses.mse_loss(z, Y), 1e-4),
    "Ridge": (linear_model.Ridge(alpha=2.0), LINE, lambda z, w, _: losses.mse_loss(z, Y, reduction="sum") + 2.0 * (w**2).sum(), 1e-4),
    "Lasso": (linear_model.Lasso(alpha=0.05, tol=1e-10), LINE, lambda z, w, _: losses.mse_loss(z, Y) / 2 + 0.05 * w.abs().sum(), 1e-4),
    "HuberRegressor": (linear_model.HuberRegressor(alpha=ALPHA, tol=1e-9, max_iter=1000), LINE, huber, 1e-4),
    "LogisticRegression": (linear_model.LogisticRegression(C=3.0, tol=1e-10, max_iter=1000), SIGN, lambda z, w, _: 3.0 * losses.bce_with_logits_loss(z, S01, reduction="sum") + half(w), 1e-4),
    "LogisticRegression(balanced)": (linear_model.LogisticRegression(C=3.0, class_weight="balanced", tol=1e-10, max_iter=1000), RARE, lambda z, w, _: 3.0 * losses.bce_with_logits_loss(z, R01, reduction="sum", weight=BALANCED[R01.long()]) + half(w), 1e-4),
    "SGDClassifier(log_loss)": (linear_model.SGDClassifier(loss="log_loss", **{**SGD, "eta0": 3.0}), SIGN, lambda z, w, _: losses.bce_with_logits_loss(z, S01) + ALPHA * half(w), 2e-2),
    "SGDClassifier(hinge)": (linear_model.SGDClassifier(loss="hinge", **SGD), SIGN, lambda z, w, _: losses.hinge_loss(z, S) + ALPHA * half(w), 2e-2),
    "SGDClassifier(modified_huber)": (linear_model.SGDClassifier(loss="modified_huber", **SGD), SIGN, lambda z, w, _: losses.modified_huber_loss(z, S) + ALPHA * half(w), 2e-2),
    "SGDRegressor(squared_error)": (linear_model.SGDRegressor(loss="squared_error", **{**SGD, "eta0": 0.05}), LINE, lambda z, w, _: losses.mse_loss(z, Y) / 2 + ALPHA * half(w), 2e-2),
    "SGDRegressor(huber)": (linear_model.SGDRegressor(loss="huber", epsilon=0.5, **SGD), LINE, lambda z, w, _: losses.huber_loss(z, Y, 0.5) + ALPHA * half(w), 2e-2),
    "SGDRegressor(epsilon_insensitive)": (linear_model.SGDRegressor(loss="epsilon_insensitive", epsilon=0.2, **SGD), LINE, lambda z, w, _: losses.epsilon_insensitive_loss(z, Y, 0.2) + ALPHA * half(w), 2e-2),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_same_coefficients(name):
    estimator, targets, objective, tolerance = TABLE[name]
    estimator.fit(X, targets)
    want = np.append(np.ravel(estimator.coef_), np.ravel(estimator.intercept_))
    got = minimise(objective)
    assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want), (got, want)


def test_balanced_weights_of_two_classes_are_a_pos_weight():
    logits = torch.as_tensor(X[:, 0])
    negatives, positives = R01.long().bincount().double()
    weighted = losses.bce_with_logits_loss(logits, R01, reduction="sum", weight=BALANCED[R01.long()])
    by_pos_weight = losses.bce_with_logits_loss(logits, R01, negatives / positives, reduction="sum")
    torch.testing.assert_close(weighted, by_pos_weight * N / (2 * negatives))


def test_balanced_classes_of_a_multinomial_regression():
    estimator = linear_model.LogisticRegression(C=3.0, class_weight="balanced", tol=1e-10, max_iter=2000).fit(X, THREE)
    labels = torch.as_tensor(THREE)
    weights = losses.class_weights(labels.bincount().double())
    w = torch.as_tensor(estimator.coef_).requires_grad_()
    b = torch.as_tensor(estimator.intercept_).requires_grad_()
    logits = torch.as_tensor(X) @ w.T + b
    objective = 3.0 * losses.cross_entropy_loss(logits, labels, reduction="sum", class_weights=weights) + half(w)
    objective.backward()
    # The objective is convex: where its gradient is 0, it has its minimum.
    size = float(torch.linalg.vector_norm(w.detach()))
    assert w.grad.abs().max() < 1e-5 * size and b.grad.abs().max() < 1e-5 * size
    # Without the weights it has not.
    w.grad = None
    (3.0 * losses.cross_entropy_loss(torch.as_tensor(X) @ w.T, labels, reduction="sum") + half(w)).backward()
    assert w.grad.abs().max() > size
