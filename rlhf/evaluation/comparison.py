"""Two models on the same prompts: the figures of both, their differences, and what can be said about them."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from rlhf.evaluation.answers import Answer, Question
from rlhf.evaluation.judging import Verdict
from rlhf.evaluation.length_control import length_controlled_win_rate
from rlhf.evaluation.statistics import (
    Estimate,
    mean_ratio,
    prompts_needed,
    share_difference,
    win_rate,
)

_SIGNIFICANT = 0.05
_BIASED = 0.1  # of the prompts that are judged for the position of an answer


@dataclass(frozen=True)
class Likelihoods:
    """How probable a model finds the answers of the data set.

    Args:
        nll: For each row, the negative log-likelihood of its answer in nats.
        tokens: For each row, the tokens of its answer, in this model's tokenizer.
        rejected_nll: For each row that is a pair, the same of the rejected answer.
        rejected_tokens: For each pair, the tokens of the rejected answer.
    """

    nll: list[float]
    tokens: list[int]
    rejected_nll: list[float] = field(default_factory=list)
    rejected_tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    """A row of the table.

    Args:
        name: With its unit.
        a: Of model A.
        b: Of model B.
        count: Prompts or rows behind it.
        estimate: The difference B − A with its interval, or the figure of B itself; None where there is no test.
        estimates_b: Whether the estimate is of B itself.
        scale: Factor of the shown numbers: 100 for per cent.
    """

    name: str
    a: float | None
    b: float | None
    count: int
    estimate: Estimate | None = None
    estimates_b: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """All that is known about two models on the same prompts.

    Args:
        names: Of A and B.
        data: Name of the data set.
        judge: Who judged; None if nobody did.
        key: Of these answers.
        questions: The prompts.
        answers: Of A and of B.
        verdicts: One for each prompt; without a score where there is none.
        figures: Rows of the table.
        remarks: Sentences about the figures.
    """

    names: tuple[str, str]
    data: str
    judge: str | None
    key: str
    questions: Sequence[Question]
    answers: tuple[Sequence[Answer], Sequence[Answer]]
    verdicts: Sequence[Verdict]
    figures: list[Figure]
    remarks: list[str]

    @property
    def counts(self) -> Counter[float]:
        """Prompts by score: 1 for B, 1/2 for ties, 0 for A."""
        return Counter(verdict.score for verdict in self.verdicts if verdict.score is not None)


def judged_figures(
    verdicts: Sequence[Verdict], a: Sequence[Answer], b: Sequence[Answer]
) -> tuple[list[Figure], list[str]]:
    """Figures of a judgement: wins, win rate, win rate at equal length, rewards.

    Args:
        verdicts: One for each prompt.
        a: Answers of A.
        b: Answers of B.

    Returns:
        Figures, and sentences about them.
    """
    judged = [index for index, verdict in enumerate(verdicts) if verdict.score is not None]
    if not judged:
        return [], ["No prompt has a verdict."]
    scores = [float(verdicts[index].score or 0) for index in judged]
    wins, ties, losses = (scores.count(score) for score in (1.0, 0.5, 0.0))
    rate, count = win_rate(wins, ties, losses), len(judged)
    figures = [
        Figure("wins", losses, wins, count),
        Figure("win rate, %", 1 - rate.value, rate.value, count, rate, estimates_b=True, scale=100),
    ]
    remarks = [_power_remark(rate, ties / count, count)]
    lengths = [len(b[index].text) - len(a[index].text) for index in judged]
    controlled = length_controlled_win_rate(scores, lengths)
    if controlled is not None:
        name, value = "win rate at equal length, %", controlled.value
        figures.append(Figure(name, 1 - value, value, count, controlled, estimates_b=True, scale=100))
    elif any(lengths):
        remarks.append("No win rate at equal length: fewer than 10 prompts, or the length alone decides who wins.")
    rewards = [pair for index in judged if (pair := verdicts[index].rewards) is not None]
    if rewards:
        figures.append(_means("mean reward", [pair[0] for pair in rewards], [pair[1] for pair in rewards]))
    if ties:
        remarks.append(f"Ties: {ties} of {count}. A tie counts as half a win.")
    if len(judged) < len(verdicts):
        remarks.append(f"Without a verdict, and left out: {len(verdicts) - len(judged)} prompts.")
    return figures, remarks + _position_remarks(verdicts)


def _power_remark(rate: Estimate, tie_share: float, count: int) -> str:
    """Whether the win rate tells the models apart, and how many prompts would."""
    shown, percent = rate.p_value < _SIGNIFICANT, f"{100 * rate.value:.1f} %"
    if shown:
        return f"B's win rate of {percent} differs from 50 % (p = {rate.p_value:.2g}, {count} prompts)."
    needed = prompts_needed(rate.value, tie_share)
    if needed is None:
        return f"{count} prompts show no difference between the models."
    # One that is short by chance alone would ask for fewer prompts than there are.
    advice = f"about {needed:,} prompts would show a true win rate of {percent} in 4 of 5 tries"
    return f"{count} prompts do not tell the models apart (p = {rate.p_value:.2g}): {advice}."


def _position_remarks(verdicts: Sequence[Verdict]) -> list[str]:
    """How often a judge that reads both answers went by their order."""
    positions = [verdict.positions for verdict in verdicts if verdict.positions is not None]
    if not positions:
        return []
    first = positions.count(("first", "first")) / len(positions)
    second = positions.count(("second", "second")) / len(positions)
    remark = (
        f"Position bias of the judge: it chose the first answer in both orders for {100 * first:.0f} % of the prompts "
        f"and the second for {100 * second:.0f} %. These count as ties."
    )
    if first + second > _BIASED:
        remark += " Such a judge is weak on these answers; a stronger one gives fewer ties."
    return [remark]


def answer_figures(a: Sequence[Answer], b: Sequence[Answer]) -> list[Figure]:
    """Lengths of the answers, how many were cut, and how many are the same.

    Args:
        a: Answers of A.
        b: Answers of B.

    Returns:
        Figures; empty without answers.
    """
    if not a:
        return []
    count = len(a)
    characters = _means("characters an answer", *([len(answer.text) for answer in answers] for answers in (a, b)))
    tokens_a, tokens_b = (fmean(len(answer.ids) for answer in answers) for answers in (a, b))
    cut_a, cut_b = (sum(not answer.is_whole for answer in answers) / count for answers in (a, b))
    same = sum(one.text == other.text for one, other in zip(a, b, strict=True)) / count
    return [
        characters,
        Figure("tokens an answer", tokens_a, tokens_b, count),
        Figure("cut at the longest length, %", cut_a, cut_b, count, scale=100),
        Figure("identical answers, %", same, same, count, scale=100),
    ]


def _means(name: str, a: Sequence[float], b: Sequence[float]) -> Figure:
    differences = [float(value_b - value_a) for value_a, value_b in zip(a, b, strict=True)]
    return Figure(name, fmean(a), fmean(b), len(a), mean_ratio(differences, [1.0] * len(a)))


def likelihood_figures(a: Likelihoods, b: Likelihoods, answer_bytes: Sequence[int]) -> list[Figure]:
    """Perplexity, bits per byte, and accuracy on pairs of both models, with paired tests.

    Args:
        a: Of model A.
        b: Of model B, for the same rows.
        answer_bytes: For each row, the bytes of its answer, which do not depend on a tokenizer.

    Returns:
        Figures; empty without rows.
    """
    if not a.nll:
        return []
    figures = []
    # Perplexities are means over tokens: with other tokens they do not compare.
    has_same_tokens = a.tokens == b.tokens
    ppl_a, ppl_b = (math.exp(min(700.0, sum(model.nll) / sum(model.tokens))) for model in (a, b))
    name = "perplexity" if has_same_tokens else "perplexity (other tokens: see bits per byte)"
    figures.append(Figure(name, ppl_a, ppl_b, len(a.nll)))
    if has_same_tokens:
        figures.append(_nats("loss, nats a token", a.nll, b.nll, a.tokens))
    if all(answer_bytes):
        bits_a, bits_b = ([nll / math.log(2) for nll in model.nll] for model in (a, b))
        figures.append(_nats("bits per byte", bits_a, bits_b, answer_bytes))
    if a.rejected_nll:
        figures.append(_accuracy("accuracy on pairs, %", a, b, _prefers_chosen))
        figures.append(_accuracy("accuracy on pairs, per token, %", a, b, _prefers_chosen_per_token))
    return figures


def _nats(name: str, a: Sequence[float], b: Sequence[float], sizes: Sequence[int]) -> Figure:
    differences = [nll_b - nll_a for nll_a, nll_b in zip(a, b, strict=True)]
    total = sum(sizes)
    return Figure(name, sum(a) / total, sum(b) / total, len(a), mean_ratio(differences, sizes))


def _accuracy(name: str, a: Likelihoods, b: Likelihoods, is_right: Callable[[Likelihoods, int], bool]) -> Figure:
    count = len(a.rejected_nll)
    right_a, right_b = ([is_right(model, row) for row in range(count)] for model in (a, b))
    gains = sum(in_b and not in_a for in_a, in_b in zip(right_a, right_b, strict=True))
    losses = sum(in_a and not in_b for in_a, in_b in zip(right_a, right_b, strict=True))
    difference = share_difference(gains, losses, count)
    return Figure(name, fmean(right_a), fmean(right_b), count, difference, scale=100)


def _prefers_chosen(model: Likelihoods, row: int) -> bool:
    return model.nll[row] < model.rejected_nll[row]


def _prefers_chosen_per_token(model: Likelihoods, row: int) -> bool:
    return model.nll[row] / model.tokens[row] < model.rejected_nll[row] / model.rejected_tokens[row]
