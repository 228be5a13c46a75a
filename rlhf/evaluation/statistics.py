"""Statistics of two models on the same prompts: win rates, paired differences, and how many prompts they need."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8
_BISECTIONS = 60  # halvings of an interval of width 2: to the last bit


@dataclass(frozen=True)
class Estimate:
    """A figure with its confidence interval and the p-value of its null hypothesis.

    Args:
        value: The figure.
        low: Lower end of the interval.
        high: Upper end of the interval.
        p_value: Two-sided, of "there is no difference".
    """

    value: float
    low: float
    high: float
    p_value: float


def share_difference(gains: int, losses: int, total: int) -> Estimate:
    r"""Difference of two paired shares, :math:`\delta = (gains - losses) / total`.

    The interval is Tango's score interval: all :math:`\delta` that a score test does not reject, with the probability
    of a loss at its most likely value under :math:`\delta`. With ``gains + losses == total`` it is Wilson's interval.
    The p-value is that of the exact McNemar test (:func:`sign_test`).

    Args:
        gains: Pairs in which the second side alone succeeds.
        losses: Pairs in which the first side alone succeeds.
        total: All pairs, those without a difference included.

    Returns:
        The difference, in [-1, 1].

    Raises:
        ValueError: There are no pairs.

    Source: Tango, Statistics in Medicine 17 (1998), 891-908. McNemar, Psychometrika 12 (1947).
    """
    if total < 1 or gains + losses > total or min(gains, losses) < 0:
        raise ValueError(f"{gains} gains and {losses} losses of {total} pairs: there must be pairs, and none twice")
    value = (gains - losses) / total
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)

    def excess(difference: float) -> float:
        """How far the score statistic is beyond ``z``: negative inside the interval."""
        return abs(_score_statistic(gains, losses, total, difference)) - z

    low = _root(excess, value, -1.0)
    high = _root(excess, value, 1.0)
    return Estimate(value, low, high, sign_test(gains, losses))


def _score_statistic(gains: int, losses: int, total: int, difference: float) -> float:
    """Tango's statistic of the hypothesis that the true difference is ``difference``."""
    distance = gains - losses - total * difference
    # The most likely probability of a loss under the hypothesis solves a x² + b x + c = 0.
    a = 2 * total
    b = (2 * total - gains + losses) * difference - gains - losses
    c = -losses * difference * (1 - difference)
    discriminant = max(0.0, b * b - 4 * a * c)
    loss_probability = (math.sqrt(discriminant) - b) / (2 * a)
    variance = total * (2 * loss_probability + difference * (1 - difference))
    if variance <= 0:  # at the ends of the range
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _root(excess: Callable[[float], float], inside: float, outside: float) -> float:
    """Where ``excess`` changes its sign between a point inside the interval and an end of the range."""
    if excess(outside) <= 0:
        return outside
    for _ in range(_BISECTIONS):
        middle = (inside + outside) / 2
        if excess(middle) > 0:
            outside = middle
        else:
            inside = middle
    return (inside + outside) / 2


def win_rate(wins: int, ties: int, losses: int) -> Estimate:
    r"""Share of prompts that the second side wins; a tie counts as half a win.

    As :math:`(1 + \delta) / 2` with the difference :math:`\delta` of :func:`share_difference`: without ties, Wilson's
    interval. Ties make it narrower, as they vary less.

    Args:
        wins: Prompts that the second side wins.
        ties: Prompts without a winner.
        losses: Prompts that the first side wins.

    Returns:
        The rate, in [0, 1]; the p-value is that of a rate of 1/2.

    Raises:
        ValueError: There are no prompts.
    """
    difference = share_difference(wins, losses, wins + ties + losses)
    rate, low, high = ((1 + end) / 2 for end in (difference.value, difference.low, difference.high))
    return Estimate(rate, low, high, difference.p_value)


def sign_test(gains: int, losses: int) -> float:
    """Exact two-sided p-value of as many gains as losses (McNemar's exact test; pairs without a difference drop out).

    Args:
        gains: Pairs in favour of one side.
        losses: Pairs in favour of the other.

    Returns:
        The p-value; 1 without any difference.
    """
    decisive, fewer = gains + losses, min(gains, losses)
    coefficient, tail = 1, 0
    for k in range(fewer + 1):
        tail += coefficient
        coefficient = coefficient * (decisive - k) // (k + 1)
    # Whole numbers up to here: a quotient of two large ones is exact, and floats would overflow.
    return min(1.0, 2 * tail / 2**decisive)


def mean_ratio(differences: Sequence[float], sizes: Sequence[float]) -> Estimate | None:
    r"""The mean difference per unit of size, :math:`r = \sum_i d_i / \sum_i s_i`, with rows as the independent units.

    With equal sizes this is the paired t-test. With the difference of two log-likelihoods and the number of bytes of
    each row it is the difference of two bits-per-byte figures.

    Args:
        differences: One for each row.
        sizes: What each row weighs, > 0.

    Returns:
        The ratio with its t interval (rows less one degrees of freedom), or None for fewer than two rows.

    Source: Cochran, Sampling Techniques (1977), eq. 6.13: the linearised variance of a ratio.
    """
    count = len(differences)
    if count < 2:
        return None
    d, s = np.asarray(differences, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    ratio = float(d.sum() / s.sum())
    residuals = d - ratio * s
    variance = float(residuals @ residuals) * count / (count - 1)
    error = math.sqrt(variance) / float(s.sum())
    if error == 0:
        return Estimate(ratio, ratio, ratio, 1.0 if ratio == 0 else 0.0)
    half_width = _t_quantile(CONFIDENCE, count - 1) * error
    p_value = 1 - t_mass(abs(ratio) / error, count - 1)
    return Estimate(ratio, ratio - half_width, ratio + half_width, p_value)


def t_mass(t: float, freedom: int) -> float:
    """Probability that Student's t lies in [-t, t].

    Args:
        t: At least 0.
        freedom: Degrees of freedom, at least 1.

    Returns:
        The probability.

    Source: Abramowitz and Stegun 26.7.3 and 26.7.4, finite sums for whole degrees of freedom.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, squared_cosine = math.sin(angle), math.cos(angle) ** 2
    is_odd = freedom % 2 == 1
    term = math.cos(angle) if is_odd else 1.0
    # Each term is the one before times (k - 1) / k · cos²; k = 3, 5, … for odd and 2, 4, … for even freedom.
    total = 0.0
    for k in range(3 if is_odd else 2, freedom + 1, 2):
        total += term
        term *= (k - 1) / k * squared_cosine
    if is_odd:
        return min(1.0, 2 / math.pi * (angle + sine * total))
    return min(1.0, sine * total)


def _t_quantile(mass: float, freedom: int) -> float:
    """The t whose :func:`t_mass` is ``mass``."""
    low, high = 0.0, 1.0
    while t_mass(high, freedom) < mass:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if t_mass(middle, freedom) < mass:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def prompts_needed(rate: float, tie_share: float) -> int | None:
    r"""How many prompts show a win rate to differ from 1/2, in 4 of 5 repetitions at the 5 % level.

    .. math:: n = \left(\frac{z_{0.975}\,\sigma_0 + z_{0.8}\,\sigma_1}{rate - 1/2}\right)^2

    The score of a prompt is 1, 1/2 or 0; its variance is :math:`\sigma_0^2 = (1 - ties) / 4` if both sides are equal,
    and :math:`\sigma_1^2 = \sigma_0^2 - (rate - 1/2)^2` at this rate.

    Args:
        rate: The win rate to show, ties counted as half.
        tie_share: Share of prompts without a winner.

    Returns:
        The number; None for a rate of 1/2, which no number shows.

    Source: Connett et al., Statistics in Medicine 6 (1987), the sample size of McNemar's test.
    """
    distance = abs(rate - 0.5)
    if distance == 0:
        return None
    equal_variance = (1 - tie_share) / 4
    variance = max(0.0, equal_variance - distance**2)
    z_level = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    z_power = NormalDist().inv_cdf(POWER)
    total = z_level * math.sqrt(equal_variance) + z_power * math.sqrt(variance)
    return math.ceil((total / distance) ** 2)
