"""Rewards under TRL's names, called as they are there: functions, and factories of functions."""

from collections.abc import Sequence
from typing import Any

from rlhf.data.formats import Turns
from rlhf.rewards.functions import (
    RewardFunction,
    completion_text,
    math_answer,
    repetition_penalty,
    soft_overlong_punishment,
    think_format,
)

get_repetition_penalty_reward = repetition_penalty
get_soft_overlong_punishment = soft_overlong_punishment


def accuracy_reward(completions: Sequence[Turns], solution: Sequence[Any], **columns: Any) -> list[float | None]:
    """:func:`~rlhf.rewards.math_answer` against the column ``solution``."""
    found: list[float | None] = math_answer()(completions, solution=solution)
    return found


def reasoning_accuracy_reward(
    completions: Sequence[Turns],
    solution: Sequence[Any],
    reasoning_delimiters: Sequence[str] = ("</think>",),
    **columns: Any,
) -> list[float | None]:
    """:func:`accuracy_reward` of what follows the reasoning; 0 where the reasoning does not end.

    Args:
        reasoning_delimiters: texts that end the reasoning; the last of them in a completion counts.
    Example:
        >>> reasoning_accuracy_reward(["<think> I think it is $2$."], ["$2$"])
        [0.0]
    """
    texts = [completion_text(completion) for completion in completions]
    ends = [max((t.rfind(d) + len(d) for d in reasoning_delimiters if d in t), default=None) for t in texts]
    answers = ["" if end is None else text[end:] for text, end in zip(texts, ends, strict=True)]
    return accuracy_reward(answers, solution)


def reasoning_accuracy(reasoning_delimiters: Sequence[str] = ("</think>",)) -> RewardFunction:
    """:func:`reasoning_accuracy_reward` with these delimiters."""

    def reward(completions: Sequence[Turns], solution: Sequence[Any], **columns: Any) -> list[float | None]:
        return reasoning_accuracy_reward(completions, solution, reasoning_delimiters)

    reward.__name__ = "reasoning_accuracy"
    return reward


def think_format_reward(completions: Sequence[Turns], **columns: Any) -> list[float]:
    """:func:`~rlhf.rewards.think_format`."""
    found: list[float] = think_format()(completions)
    return found
