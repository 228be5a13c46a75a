r"""Regression losses, element by element, on the residual :math:`r = \hat y - y`."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.losses._checks import check_range, check_same_shape
from rlhf.losses._reduction import reducible
from rlhf.losses._suspicions import check_regression_targets


def _check_targets(arguments: dict[str, Any], mask: Tensor | None) -> None:
    check_regression_targets(arguments["targets"], mask)


def _residual(predictions: Tensor, targets: Tensor) -> Tensor:
    # No silent broadcast of [B, 1] against [B].
    check_same_shape(predictions=predictions, targets=targets)
    return predictions - targets


@reducible("predictions", "targets", check=_check_targets)
def mse_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    r"""Squared error: estimates the mean; outliers have a large influence.

    .. math:: r^2

    Args:
        predictions: any shape, floating point; carries the gradient.
        targets: same shape, floating point.
    Returns:
        Scalar, or the shape of the input for ``"none"``; at least float32; in squared units; 0 if nothing counts.
    Raises:
        ValueError: shapes differ, or an input is not floating point.
    Example:
        >>> mse_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(2.)

    Source: Gauss 1809. As ``torch.nn.functional.mse_loss``, with a mask, and without broadcasting.
    """
    check_same_shape(predictions=predictions, targets=targets)
    # torch only warns of shapes that broadcast; the check above raises.
    return F.mse_loss(predictions, targets, reduction="none")


@reducible("predictions", "targets", check=_check_targets)
def mae_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    r"""Absolute error: estimates the median; the gradient is ±1 at any distance from the target.

    .. math:: |r|

    Args:
        predictions: any shape, floating point; carries the gradient.
        targets: same shape, floating point.
    Returns:
        Scalar, or the shape of the input for ``"none"``; at least float32; in the units of the target; 0 if nothing
        counts.
    Raises:
        ValueError: shapes differ, or an input is not floating point.
    Example:
        >>> mae_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        tensor(1.)

    Source: Boscovich 1757, Laplace 1793. As ``torch.nn.functional.l1_loss``.
    """
    check_same_shape(predictions=predictions, targets=targets)
    # At a residual of 0 torch's gradient is 0, the middle of the subgradients.
    return F.l1_loss(predictions, targets, reduction="none")


@reducible("predictions", "targets", check=_check_targets)
def huber_loss(predictions: Tensor, targets: Tensor, delta: float = 1.0) -> Tensor:
    r"""Squared error near the target and absolute error beyond ``delta``: outliers have a bounded gradient.

    .. math:: \tfrac12 r^2 \text{ if } |r| \le \delta, \text{ else } \delta\,(|r| - \tfrac12\delta)

    ``huber_loss(delta=d) = d * smooth_l1_loss(beta=d)``.

    Args:
        predictions: any shape, floating point; carries the gradient.
        targets: same shape, floating point.
        delta: > 0, in the units of the target; about the size of an ordinary residual.
    Returns:
        Scalar, or the shape of the input for ``"none"``; at least float32; in squared units; 0 if nothing counts.
    Raises:
        ValueError: shapes differ, or an input is not floating point, or ``delta <= 0``.
    Example:
        >>> huber_loss(torch.tensor([0.5, 3.0]), torch.zeros(2), reduction="none")
        tensor([0.1250, 2.5000])

    Source: Huber 1964, eq. 2.6. As ``torch.nn.functional.huber_loss``.
    """
    # At 0 the loss and its gradient would be 0 everywhere.
    check_range("delta", delta, 0.0, math.inf, open_low=True)
    check_same_shape(predictions=predictions, targets=targets)
    return F.huber_loss(predictions, targets, delta=delta, reduction="none")


@reducible("predictions", "targets", check=_check_targets)
def smooth_l1_loss(predictions: Tensor, targets: Tensor, beta: float = 1.0) -> Tensor:
    r"""Huber's loss divided by its threshold: the slope far from the target is 1 for any ``beta``.

    .. math:: \tfrac12 r^2/\beta \text{ if } |r| < \beta, \text{ else } |r| - \tfrac12\beta

    ``smooth_l1_loss(beta=b) = huber_loss(delta=b) / b``; ``beta = 0`` is :func:`mae_loss`.

    Args:
        predictions: any shape, floating point; carries the gradient.
        targets: same shape, floating point.
        beta: >= 0, in the units of the target; residuals below it are squared.
    Returns:
        Scalar, or the shape of the input for ``"none"``; at least float32; in the units of the target; 0 if nothing
        counts.
    Raises:
        ValueError: shapes differ, or an input is not floating point, or ``beta < 0``.
    Example:
        >>> smooth_l1_loss(torch.tensor([0.5, 3.0]), torch.zeros(2), beta=2.0, reduction="none")
        tensor([0.0625, 2.0000])

    Source: arXiv 1504.08083 eq. 3 (beta = 1). As ``torch.nn.functional.smooth_l1_loss``.
    """
    check_range("beta", beta, 0.0, math.inf)
    check_same_shape(predictions=predictions, targets=targets)
    # At beta 0 torch takes the absolute error instead of dividing by 0.
    return F.smooth_l1_loss(predictions, targets, beta=beta, reduction="none")


@reducible("predictions", "targets", check=_check_targets)
def log_cosh_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    r"""Like Huber's loss with delta 1, but with smooth derivatives of all orders.

    .. math:: \log\cosh r = |r| + \log(1 + e^{-2|r|}) - \log 2

    Args:
        predictions: any shape, floating point; carries the gradient.
        targets: same shape, floating point.
    Returns:
        Scalar, or the shape of the input for ``"none"``; at least float32; in the units of the target; 0 if nothing
        counts.
    Raises:
        ValueError: shapes differ, or an input is not floating point.
    Example:
        >>> log_cosh_loss(torch.tensor([0.0, 1000.0]), torch.zeros(2), reduction="none")
        tensor([  0.0000, 999.3068])

    Source: Green 1990; the second form does not overflow.
    """
    residual = _residual(predictions, targets)
    # log cosh without overflow; unlike a form with |residual| it has a derivative at 0.
    # Its gradient is exactly tanh(residual).
    return residual + F.softplus(-2 * residual) - math.log(2)


@reducible("predictions", "targets", check=_check_targets)
def quantile_loss(predictions: Tensor, targets: Tensor, quantile: float = 0.5) -> Tensor:
    r"""Pinball loss: estimates a quantile of the target.

    .. math:: \max(q\,e, (q-1)\,e),\; e = y - \hat y

    Args:
        predictions: any shape, floating point; carries the gradient.
        targets: same shape, floating point.
        quantile: in (0, 1). 0.9 punishes predictions that are too low nine times as much; 0.5 is half of MAE.
    Returns:
        Scalar, or the shape of the input for ``"none"``; at least float32; in the units of the target; 0 if nothing
        counts.
    Raises:
        ValueError: shapes differ, or an input is not floating point, or a quantile outside (0, 1).
    Example:
        >>> quantile_loss(torch.zeros(2), torch.tensor([1.0, -1.0]), quantile=0.75, reduction="none")
        tensor([0.7500, 0.2500])

    Source: Koenker and Bassett 1978.
    """
    check_range("quantile", quantile, 0.0, 1.0, open_low=True)
    # Positive where the prediction is too low, which a high quantile punishes more.
    shortfall = -_residual(predictions, targets)
    return torch.maximum(quantile * shortfall, (quantile - 1) * shortfall)


@reducible("predictions", "targets", check=_check_targets)
def epsilon_insensitive_loss(predictions: Tensor, targets: Tensor, epsilon: float = 0.1) -> Tensor:
    r"""Absolute error beyond a tube: residuals within ``epsilon`` cost nothing.

    .. math:: \max(0, |r| - \epsilon)

    Args:
        predictions: any shape, floating point; carries the gradient.
        targets: same shape, floating point.
        epsilon: >= 0, in the units of the target.
    Returns:
        Scalar, or the shape of the input for ``"none"``; at least float32; in the units of the target; 0 if nothing
        counts.
    Raises:
        ValueError: shapes differ, or an input is not floating point, or ``epsilon < 0``.
    Example:
        >>> epsilon_insensitive_loss(torch.tensor([0.05, 1.0]), torch.zeros(2), reduction="none")
        tensor([0.0000, 0.9000])

    Source: Vapnik 1995; the loss of ``sklearn.svm.SVR``.
    """
    check_range("epsilon", epsilon, 0.0, math.inf)
    # Inside the tube the gradient is 0: only the points outside of it (support vectors) train.
    return F.relu(_residual(predictions, targets).abs() - epsilon)
