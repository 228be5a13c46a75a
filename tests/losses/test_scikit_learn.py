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
