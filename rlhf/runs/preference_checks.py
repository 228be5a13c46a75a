"""Health of training on preferences: DPO, KTO, reward models."""

from rlhf.runs.figures import EVALUATION, Figures, Series
from rlhf.runs.findings import Check, Finding, FindingOrNot, number
from rlhf.runs.training_checks import MIN_LINES_FOR_STANDSTILL, last_mean

_ACCURACIES = ("rewards/accuracies", "accuracy")
PERFECT = 0.98  # accuracy
EARLY = 0.2  # share of the steps
BELOW_CHANCE = 0.45
LESS_LIKELY = 1.5  # times the perplexity of the chosen answers
LESS_LIKELY_SUMS = 0.1  # relative fall of their log-probs, where no perplexity is logged


def perfect_at_once(figures: Figures) -> FindingOrNot:
    """Pairs that are told apart after few steps: something other than quality tells them apart."""
    accuracy = _accuracy(figures, evaluation=False)
    if accuracy is None:
        return None
    end = EARLY * figures.last_step
    # Before the first step a policy equals its reference, and all margins are 0.
    early = [value for step, value in zip(accuracy.steps, accuracy.values, strict=True) if 1 < step <= end]
    if len(early) < 2 or early[-1] < PERFECT or last_mean(accuracy) < PERFECT:
        return []
    first_step = next(step for step, value in zip(accuracy.steps, accuracy.values, strict=True) if value >= PERFECT)
    return [
        Finding(
            "warning",
            "Chosen and rejected answers were told apart almost at once.",
            f"accuracy {number(early[-1])} from step {first_step} of {figures.last_step} on",
            "Look for a marker that gives chosen answers away: length, a form of words, a missing end "
            "(`rlhf data FILE` shows lengths and rows).",
        )
    ]


def below_chance(figures: Figures) -> FindingOrNot:
    """Rejected answers that are preferred at the end."""
    accuracy = _accuracy(figures, evaluation=True)
    if accuracy is None or (len(accuracy) < MIN_LINES_FOR_STANDSTILL and not accuracy.name.startswith(EVALUATION)):
        return None
    last = last_mean(accuracy)
    if last >= BELOW_CHANCE:
        return []
    return [
        Finding(
            "warning",
            "Rejected answers are preferred to chosen ones.",
            f"`{accuracy.name}` is {number(last)} in the last third; 0.5 is chance",
            "Check that the columns chosen and rejected are not swapped, and that held-out pairs are of the same kind.",
        )
    ]


def chosen_becomes_unlikely(figures: Figures) -> FindingOrNot:
    """A margin that grows while chosen answers become less likely (likelihood displacement, arXiv 2410.08847)."""
    margins = figures.evaluated("rewards/margins")
    perplexity, logps = figures.evaluated("perplexity/chosen"), figures.evaluated("logps/chosen")
    measured = perplexity if len(perplexity) > 1 else logps
    if len(margins) < 2 or len(measured) < 2:
        return None
    change, margin_change = measured.change(), margins.change()
    if measured is perplexity:
        fell = change.after > LESS_LIKELY * change.before
    else:
        fell = change.difference < -LESS_LIKELY_SUMS * abs(change.before)
    if not fell or not change.is_clear(2.0) or margin_change.difference <= 0:
        return []
    return [
        Finding(
            "warning",
            "The margin grows, but chosen answers become less likely.",
            f"`{measured.name}` went from {number(change.before)} to {number(change.after)}, "
            f"the margin from {number(margin_change.before)} to {number(margin_change.after)}",
            "Raise beta, lower learning_rate, or use loss_type rpo (with an SFT term) or apo_zero "
            "(arXiv 2410.08847, 2402.13228).",
        )
    ]


def _accuracy(figures: Figures, evaluation: bool) -> Series | None:
    for name in _ACCURACIES:
        series = figures.evaluated(name) if evaluation else figures.series(name)
        if len(series) > 1:
            return series
    return None


PREFERENCE_CHECKS = (
    Check("Pairs are not told apart at once", perfect_at_once),
    Check("Chosen answers are preferred at least as often as chance", below_chance),
    Check("Chosen answers stay likely while the margin grows", chosen_becomes_unlikely),
)
