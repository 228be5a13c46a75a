"""Rewards under TRL's names, called as they are there: functions, and factories of functions."""

from collections.abc import Sequence
from typing import Any

from rlhf.data.messages import Turns
from rlhf.rewards.functions import (
    RewardFunction,
    completion_text,
    math_answer,
    repetition_penalty,
    soft_overlong_punishment,
    think_format,
)

# TRL has factories for these two, as we have, and plain functions for the others.
get_repetition_penalty_reward = repetition_penalty
get_soft_overlong_punishment = soft_overlong_punishment


def accuracy_reward(completions: Sequence[Turns], solution: Sequence[Any], **columns: Any) -> list[float | None]:
    """:func:`~rlhf.rewards.math_answer` against the column ``solution``.

    Args:
        completions: texts, or lists of messages.
        solution: the solution of each, in LaTeX or plain.
        **columns: not read.
    Returns:
        1 or 0 for each completion, None for an unreadable solution.
    """
    rewards: list[float | None] = math_answer()(completions, solution=solution)
    return rewards


def reasoning_accuracy_reward(
    completions: Sequence[Turns],
    solution: Sequence[Any],
    reasoning_delimiters: Sequence[str] = ("</think>",),
    **columns: Any,
) -> list[float | None]:
    """:func:`accuracy_reward` of the answer after the reasoning; 0 where the reasoning does not end.

    Args:
        completions: texts, or lists of messages.
        solution: the solution of each, in LaTeX or plain.
        reasoning_delimiters: texts that end the reasoning; the last of them in a completion counts.
        **columns: not read.
    Returns:
        1 or 0 for each completion, None for an unreadable solution.
    Example:
        >>> reasoning_accuracy_reward(["<think> I think it is $2$."], ["$2$"])
        [0.0]
    """
    # As in TRL: where the reasoning does not end, the answer is empty and scores 0.
    answers = [_after_reasoning(completion_text(completion), reasoning_delimiters) for completion in completions]
    return accuracy_reward(answers, solution)


def _after_reasoning(text: str, delimiters: Sequence[str]) -> str:
    """The text after the last delimiter; empty where there is none."""
    # The last end of all delimiters: a model may think again after its first answer.
    ends = [text.rfind(delimiter) + len(delimiter) for delimiter in delimiters if delimiter in text]
    return text[max(ends) :] if ends else ""


def reasoning_accuracy(reasoning_delimiters: Sequence[str] = ("</think>",)) -> RewardFunction:
    """:func:`reasoning_accuracy_reward` as a factory, for ``--reward_funcs``.

    Args:
        reasoning_delimiters: texts that end the reasoning.
    Returns:
        A reward function of ``completions`` and ``solution``.
    """

    def reward(completions: Sequence[Turns], solution: Sequence[Any], **columns: Any) -> list[float | None]:
        return reasoning_accuracy_reward(completions, solution, reasoning_delimiters)

    # The name under which its values are logged.
    reward.__name__ = "reasoning_accuracy"
    return reward


def think_format_reward(completions: Sequence[Turns], **columns: Any) -> list[float]:
    """:func:`~rlhf.rewards.think_format`.

    Args:
        completions: texts, or lists of messages.
        **columns: not read.
    Returns:
        1 or 0 for each completion.
    """
    rewards: list[float] = think_format()(completions)
    return rewards
