"""The win rate that two models would have with answers of the same length."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from rlhf.evaluation.statistics import CONFIDENCE, Estimate

_FEWEST = 10  # prompts for two coefficients
_LARGEST = 12.0  # a log-odds of 12 is a rate of 0.999994: the data are separated by length
_ITERATIONS = 50


def length_controlled_win_rate(scores: Sequence[float], length_differences: Sequence[float]) -> Estimate | None:
    r"""Win rate of the second side at equal length, from a logistic regression on the difference of lengths.

    .. math:: P(\text{win}) = \sigma\left(\theta + \varphi \tanh(\Delta / \mathrm{std}(\Delta))\right)

    The rate is :math:`\sigma(\theta)`, the prediction for :math:`\Delta = 0`. Its interval comes from the robust
    (sandwich) variance, as scores of 1/2 are no Bernoulli draws, and is symmetric in log-odds.

    Args:
        scores: For each prompt 1 for a win of the second side, 1/2 for a tie, 0 for a loss.
        length_differences: For each prompt, length of the second answer less that of the first.

    Returns:
        The rate; None where it cannot be told from lengths: fewer than 10 prompts, all differences alike, or wins that
        follow from the length alone.

    Source: Dubois et al., arXiv 2404.04475 (AlpacaEval 2). Their term for the difficulty of an instruction is left
    out: it needs the answers of many models.
    """
    outcomes = np.asarray(scores, dtype=np.float64)
    differences = np.asarray(length_differences, dtype=np.float64)
    spread = float(differences.std()) if len(differences) else 0.0
    if len(outcomes) < _FEWEST or spread == 0:
        return None
    design = np.stack([np.ones_like(outcomes), np.tanh(differences / spread)], axis=1)
    coefficients = _logistic_fit(design, outcomes)
    if coefficients is None:
        return None
    log_odds = float(coefficients[0])
    error = math.sqrt(_robust_covariance(design, outcomes, coefficients)[0, 0])
    half_width = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) * error
    # Each prompt fitted exactly has no variance left, and so no test.
    p_value = 2 * NormalDist().cdf(-abs(log_odds) / error) if error > 0 else math.nan
    low, high = _sigmoid(log_odds - half_width), _sigmoid(log_odds + half_width)
    return Estimate(_sigmoid(log_odds), low, high, p_value)


def _logistic_fit(design: np.ndarray, outcomes: np.ndarray) -> np.ndarray | None:
    """Coefficients of the maximum likelihood by Newton's method; None where there is no maximum.

    Args:
        design: [n, k], the covariates of each prompt.
        outcomes: [n], in [0, 1].
    """
    coefficients = np.zeros(design.shape[1])
    for _ in range(_ITERATIONS):
        probabilities = _probabilities(design, coefficients)
        gradient = design.T @ (outcomes - probabilities)
        try:
            step = np.linalg.solve(_information(design, probabilities), gradient)
        except np.linalg.LinAlgError:
            return None
        coefficients = coefficients + step
        # Without a maximum the coefficients grow without end.
        if np.abs(coefficients).max() > _LARGEST:
            return None
        if np.abs(step).max() < 1e-10:
            return coefficients
    return None


def _probabilities(design: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-(design @ coefficients)))


def _information(design: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    weights = probabilities * (1 - probabilities)
    return design.T @ (design * weights[:, None])


def _robust_covariance(design: np.ndarray, outcomes: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Covariance of the coefficients that does not rely on the outcomes being Bernoulli draws (HC1)."""
    probabilities = _probabilities(design, coefficients)
    bread = np.linalg.inv(_information(design, probabilities))
    residuals = design * (outcomes - probabilities)[:, None]
    count, size = design.shape
    return bread @ (residuals.T @ residuals) @ bread * count / (count - size)


def _sigmoid(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))
