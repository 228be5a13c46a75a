"""Statistics of a comparison against SciPy, scikit-learn, closed forms and simulated coverage."""

from functools import cache

import numpy as np
import pytest
from scipy import optimize, special, stats
from sklearn.linear_model import LogisticRegression

from rlhf.evaluation.length_control import length_controlled_win_rate
from rlhf.evaluation.statistics import mean_ratio, prompts_needed, share_difference, sign_test, t_mass, win_rate


@pytest.mark.parametrize(("wins", "losses"), [(7, 3), (50, 50), (0, 5), (12, 0), (400, 350)])
def test_without_ties_the_interval_is_wilsons(wins, losses):
    rate = win_rate(wins, 0, losses)
    want = stats.binomtest(wins, wins + losses)
    interval = want.proportion_ci(method="wilson")
    assert (rate.low, rate.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert rate.value == wins / (wins + losses) and rate.p_value == pytest.approx(want.pvalue, rel=1e-12)


def test_ties_count_as_half_and_make_the_interval_narrower():
    few, many = win_rate(30, 20, 20), win_rate(15, 50, 5)
    assert few.value == pytest.approx(40 / 70) and many.value == pytest.approx(40 / 70)
    assert few.low < many.low < many.value < many.high < few.high
    # The two sides are each other's mirror.
    other = win_rate(20, 20, 30)
    assert (other.low, other.high) == pytest.approx((1 - few.high, 1 - few.low), abs=1e-12)


@pytest.mark.parametrize(("gains", "losses", "total"), [(1, 0, 44), (12, 2, 75), (9, 21, 100)])
def test_at_the_ends_of_the_interval_the_score_test_just_rejects(gains, losses, total):
    """The probability of a loss under the hypothesis is maximised numerically, without the closed form."""
    found = share_difference(gains, losses, total)
    for end in (found.low, found.high):
        share = maximum_likelihood_of_losses(gains, losses, total, end)
        variance = total * (2 * share + end - end**2)
        assert abs(gains - losses - total * end) / np.sqrt(variance) == pytest.approx(1.959964, rel=1e-4)


def maximum_likelihood_of_losses(gains, losses, total, difference):
    def negative(share):
        probabilities = [share + difference, share, 1 - 2 * share - difference]
        return -sum(special.xlogy([gains, losses, total - gains - losses], probabilities))

    bounds = (max(0, -difference), (1 - difference) / 2)
    return optimize.minimize_scalar(negative, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x


def test_the_sign_test_is_exact():
    for gains, losses in ((0, 0), (3, 9), (9, 3), (600, 500), (3000, 2900)):
        want = stats.binomtest(gains, gains + losses).pvalue if gains + losses else 1.0
        assert sign_test(gains, losses) == pytest.approx(want, rel=1e-9)


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="there must be pairs"):
        share_difference(0, 0, 0)


@pytest.mark.parametrize("tie_share", [0.0, 0.3])
@pytest.mark.parametrize(("count", "rate"), [(20, 0.5), (50, 0.7), (200, 0.55)])
def test_the_interval_of_the_win_rate_covers_as_it_says(count, rate, tie_share):
    win_share = rate - tie_share / 2
    draws = np.random.default_rng(0).multinomial(count, [win_share, tie_share, 1 - win_share - tie_share], size=2000)
    interval = cache(lambda *counts: win_rate(*counts))
    found = [interval(*map(int, counts)) for counts in draws]
    coverage = np.mean([estimate.low <= rate <= estimate.high for estimate in found])
    assert 0.93 <= coverage <= 0.975  # 2,000 draws have a standard error of 0.005; counts are whole numbers
    if rate == 0.5:
        assert np.mean([estimate.p_value < 0.05 for estimate in found]) <= 0.05 + 2 * 0.005


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30, 101])
def test_students_t_is_that_of_scipy(freedom):
    for t in (0.0, 0.3, 1.0, 2.5, 8.0):
        assert t_mass(t, freedom) == pytest.approx(1 - 2 * stats.t.sf(t, freedom), abs=1e-13)


def test_rows_of_one_size_are_a_paired_t_test():
    a, b = np.random.default_rng(1).normal(size=(2, 15))
    found = mean_ratio(b - a, np.ones(15))
    want = stats.ttest_rel(b, a)
    interval = want.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.p_value == pytest.approx(want.pvalue, rel=1e-9) and found.value == pytest.approx((b - a).mean())


def test_the_interval_of_a_ratio_covers_as_it_says():
    random, covered = np.random.default_rng(2), []
    for _ in range(1000):
        sizes = random.integers(5, 60, size=30)
        # Longer rows vary more, as sums over tokens do.
        found = mean_ratio(0.1 * sizes + np.sqrt(sizes) * random.normal(size=30), sizes)
        covered.append(found.low <= 0.1 <= found.high)
    assert 0.925 <= np.mean(covered) <= 0.97  # standard error 0.007


def test_equal_rows_have_no_difference_and_one_row_no_interval():
    assert mean_ratio([0.0, 0.0], [3, 4]).p_value == 1.0
    assert mean_ratio([1.0], [3]) is None


def test_as_many_prompts_as_said_show_the_difference_in_four_of_five_repetitions():
    needed = prompts_needed(0.62, 0.2)
    draws = np.random.default_rng(3).multinomial(needed, [0.52, 0.2, 0.28], size=2000)
    z = (draws[:, 0] - draws[:, 2]) / np.sqrt(draws[:, 0] + draws[:, 2])
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.04)
    assert prompts_needed(0.5, 0.0) is None
    # The textbook's case without ties: 60 % against 50 %.
    assert prompts_needed(0.6, 0.0) == 194


def judged(count, log_odds, slope, seed=0):
    """Scores that favour the longer answer, with lengths that favour the second side."""
    random = np.random.default_rng(seed)
    differences = random.normal(1.0, 1.5, size=count)
    shown = np.tanh(differences / differences.std())
    scores = (random.random(count) < 1 / (1 + np.exp(-(log_odds + slope * shown)))).astype(float)
    return scores, differences, shown


def test_the_regression_on_length_is_that_of_scikit_learn():
    scores, differences, shown = judged(300, 0.2, 1.5)
    fit = LogisticRegression(C=np.inf, tol=1e-10).fit(shown[:, None], scores)
    found = length_controlled_win_rate(scores, differences)
    assert found.value == pytest.approx(1 / (1 + np.exp(-fit.intercept_[0])), abs=1e-6)
    # Longer answers alone made the second side look better.
    assert scores.mean() > found.high


def test_a_tie_is_half_a_win_in_the_regression():
    scores, differences, shown = judged(200, -0.3, 1.0, seed=1)
    scores[::4] = 0.5
    # Half a win is a win and a loss with weights of 1/2.
    twice = LogisticRegression(C=np.inf, tol=1e-10).fit(
        np.tile(shown, 2)[:, None], np.repeat([1, 0], 200), np.r_[scores, 1 - scores]
    )
    found = length_controlled_win_rate(scores, differences)
    assert found.value == pytest.approx(1 / (1 + np.exp(-twice.intercept_[0])), abs=1e-6)


def test_the_length_controlled_interval_covers_as_it_says():
    covered = []
    for seed in range(1000):
        scores, differences, _ = judged(100, 0.4, 1.0, seed)
        found = length_controlled_win_rate(scores, differences)
        covered.append(found.low <= 1 / (1 + np.exp(-0.4)) <= found.high)
    assert 0.925 <= np.mean(covered) <= 0.97  # standard error 0.007


def test_lengths_that_tell_all_or_nothing_give_no_rate():
    differences = np.linspace(-1, 1, 20)
    assert length_controlled_win_rate(differences > 0, differences) is None  # the longer one always wins
    assert length_controlled_win_rate([1, 0] * 10, [5] * 20) is None
    assert length_controlled_win_rate([1, 0, 1], [1, 2, 3]) is None
