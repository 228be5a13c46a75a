"""Built-in rewards: each is a factory that takes its options and returns a reward function.

A reward function reads ``completions`` (plain text, or lists of messages) or ``completion_ids``, and columns of the
data by their names. It returns one number for each completion; None where it does not apply.
"""

import logging
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from inspect import Parameter, Signature
from typing import Any

from rlhf.data.messages import Turns
from rlhf.rewards.numbers import stated_number

RewardFunction = Callable[..., Any]  # (prompts, completions, **columns) -> list[float | None], or a coroutine of it


def completion_text(completion: Turns) -> str:
    """The text of a completion: itself, or the content of its last assistant message.

    Args:
        completion: text, or a list of messages.
    Returns:
        The text; empty if there is no assistant message.
    Example:
        >>> completion_text([{"role": "assistant", "content": "42"}])
        '42'
    """
    if isinstance(completion, str):
        return completion
    # With tools a completion has several turns, some of them the tools': the answer is the assistant's last.
    answers = [turn for turn in completion if turn.get("role", "assistant") == "assistant"]
    content = answers[-1].get("content") if answers else None
    if isinstance(content, list):  # blocks of text and images
        return "".join(str(block.get("text", "")) for block in content)
    return content or ""


def exact_match(column: str = "answer", *, pattern: str | None = None, ignore_case: bool = False) -> RewardFunction:
    """1 where the completion is the answer, white space around it aside, else 0.

    Args:
        column: the column with the answer; a row where it is None gets None.
        pattern: compare the last match of this regular expression (its first group, if it has one) instead of the
            whole completion; ``.`` spans lines. No match, no reward.
        ignore_case: compare without regard to case.
    Returns:
        A reward function.
    Raises:
        ValueError: ``pattern`` is no regular expression.
    Example:
        >>> exact_match(pattern="<answer>(.*?)</answer>")(["So <answer> Paris </answer>."], answer=["Paris"])
        [1.0]
    """
    regex = _compile(pattern) if pattern is not None else None

    def equal(text: str, answer: Any) -> float:
        if regex is not None:
            occurrences = list(regex.finditer(text))
            if not occurrences:
                return 0.0
            # The last one: a model may try several answers before it settles.
            text = occurrences[-1].group(1 if regex.groups else 0) or ""
        stated, expected = text.strip(), str(answer).strip()
        if ignore_case:
            stated, expected = stated.casefold(), expected.casefold()
        return float(stated == expected)

    return _on_answers("exact_match", column, equal)


def numeric_answer(column: str = "answer", *, tolerance: float = 0.0) -> RewardFunction:
    r"""1 where the completion's number is the answer's, else 0.

    The number is the first one after the last ``####`` (GSM8K) or ``\boxed{``, or else the last one of the text.
    ``1,234.50``, ``-3``, ``$5``, ``1e-3``, ``3/4``, ``2 1/2``, ``\frac{3}{4}`` and ``50%`` are numbers; a percentage
    equals both its figure and its hundredth (50% is 50 and 0.5) unless both sides are percentages.

    Args:
        column: the column with the answer, text or number; a row where it holds no number gets None.
        tolerance: largest difference, relative to the answer, in [0, 1); 0 compares exactly, as fractions.
    Returns:
        A reward function.
    Example:
        >>> numeric_answer()(["6 times 7 is 42."], answer=["Six sevens.\n#### 42"])
        [1.0]
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")

    def equal(text: str, answer: Any) -> float | None:
        expected, stated = stated_number(str(answer)), stated_number(text)
        if expected is None:
            return None
        if stated is None:
            return 0.0
        # 50% is the answer 50 as well as 0.5, but two percentages are compared as they are.
        readings = [stated.value]
        if stated.percent and not expected.percent:
            readings.append(stated.value / 100)
        elif expected.percent and not stated.percent:
            readings.append(stated.value * 100)
        # Fractions compare exactly: 0.1 + 0.2 is 0.3 here.
        allowed = Fraction(tolerance) * abs(expected.value)
        return float(any(abs(reading - expected.value) <= allowed for reading in readings))

    return _on_answers("numeric_answer", column, equal)


def math_answer(column: str = "solution") -> RewardFunction:
    """1 where math-verify finds the completion's answer equal to the solution, else 0; None for an unreadable solution.

    math-verify's own time limits are off: they would cancel the alarm of a :class:`~rlhf.rewards.RewardSet`, whose
    limit holds instead.

    Args:
        column: the column with the solution, in LaTeX or plain.
    Returns:
        A reward function.
    Raises:
        ValueError: math-verify is not installed.
    """
    # Imported where it is used: it is an extra, and brings SymPy.
    try:
        from math_verify import parse, verify
    except ImportError:
        raise ValueError(
            "math_answer needs math-verify: pip install 'rlhf-exact[math]', or use numeric_answer"
        ) from None
    for name in ("math_verify.parser", "math_verify.grader"):  # they warn of each call without a limit
        logging.getLogger(name).setLevel(logging.ERROR)

    def equal(text: str, solution: Any) -> float | None:
        # No solution that can be read: the reward does not apply, whatever the completion says.
        gold = parse(str(solution), parsing_timeout=None)
        if not gold:
            return None
        return float(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None))

    return _on_answers("math_answer", column, equal)


def matches(pattern: str) -> RewardFunction:
    r"""1 where the regular expression is found in the completion, else 0.

    Args:
        pattern: a regular expression; ``.`` spans lines, ``\A`` and ``\Z`` anchor it.
    Returns:
        A reward function.
    Raises:
        ValueError: ``pattern`` is no regular expression.
    Example:
        >>> matches(r"\A<b>.*</b>\Z")(["<b>yes</b>", "no"])
        [1.0, 0.0]
    """
    regex = _compile(pattern)
    return _on_texts("matches", lambda text: float(regex.search(text) is not None))


def think_format() -> RewardFunction:
    """1 where the completion begins with its only ``<think>`` and closes it, else 0; TRL's ``think_format_reward``.

    Returns:
        A reward function.
    Example:
        >>> think_format()(["<think>six sevens</think> 42", "42"])
        [1.0, 0.0]
    """
    # One <think> at the start, none after it, and an end.
    reward = matches(r"\A<think>(?!.*<think>).*?</think>")
    reward.__name__ = "think_format"
    return reward


def length_reward(target: int) -> RewardFunction:
    """How far the completion's length in tokens is from ``target``: 0 at the target, falling to -1.

    ``-min(1, |length - target| / target)``

    Args:
        target: the wanted length in tokens, at least 1.
    Returns:
        A reward function.
    Example:
        >>> length_reward(10)(completion_ids=[[1] * 10, [1] * 5, [1] * 30])
        [0.0, -0.5, -1.0]

    Source: LCPO-Exact, arXiv 2503.04697, with α = 1/target; the floor of -1 is ours.
    """
    if target < 1:
        raise ValueError(f"target must be at least 1 token, got {target}")
    # 0.0 - x, so that the reward at the target is 0.0 and not -0.0.
    return _on_ids("length_reward", lambda ids: 0.0 - min(1.0, abs(len(ids) - target) / target))


def repetition_penalty(ngram_size: int = 3, max_penalty: float = -1.0) -> RewardFunction:
    """``max_penalty`` times the fraction of the completion's token n-grams that repeat an earlier one.

    Args:
        ngram_size: tokens in an n-gram, at least 1; a shorter completion gets 0.
        max_penalty: the least reward, at most 0.
    Returns:
        A reward function.
    Example:
        >>> repetition_penalty(ngram_size=2)(completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5]])
        [0.0, -0.75]

    Source: arXiv 2502.03373 appendix C.2; TRL's ``get_repetition_penalty_reward``.
    """
    if ngram_size < 1:
        raise ValueError(f"ngram_size must be at least 1, got {ngram_size}")
    if max_penalty > 0:
        raise ValueError(f"max_penalty must not be positive, got {max_penalty}")

    def penalty(ids: Sequence[int]) -> float:
        starts = range(len(ids) - ngram_size + 1)
        ngrams = [tuple(ids[start : start + ngram_size]) for start in starts]
        # All but the first occurrence of each n-gram.
        repeated = len(ngrams) - len(set(ngrams))
        return max_penalty * repeated / len(ngrams) if repeated else 0.0

    return _on_ids("repetition_penalty", penalty)


def soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> RewardFunction:
    """0 up to a length, then falling linearly to -1.

    Args:
        max_completion_len: tokens from which on the reward is -1.
        soft_punish_cache: tokens before that over which the reward falls from 0.
    Returns:
        A reward function.
    Example:
        >>> soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)(completion_ids=[[1] * 90])
        [-0.5]

    Source: DAPO, arXiv 2503.14476 eq. 13; TRL's ``get_soft_overlong_punishment``.
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ValueError(
            f"soft_punish_cache must be in [0, max_completion_len = {max_completion_len}], got {soft_punish_cache}"
        )
    free_length = max_completion_len - soft_punish_cache

    def punishment(ids: Sequence[int]) -> float:
        excess = len(ids) - free_length
        if excess <= 0:
            return 0.0
        # Before the division: soft_punish_cache may be 0.
        if len(ids) > max_completion_len:
            return -1.0
        return -excess / soft_punish_cache

    return _on_ids("soft_overlong_punishment", punishment)


# From a function of one sample to one of a batch


def _on_texts(name: str, score: Callable[[str], float]) -> RewardFunction:
    def reward(completions: Sequence[Turns], **columns: Any) -> list[float]:
        return [score(completion_text(completion)) for completion in completions]

    reward.__name__ = name
    return reward


def _on_ids(name: str, score: Callable[[Sequence[int]], float]) -> RewardFunction:
    def reward(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [score(ids) for ids in completion_ids]

    reward.__name__ = name
    return reward


def _on_answers(name: str, column: str, score: Callable[[str, Any], float | None]) -> RewardFunction:
    def reward(completions: Sequence[Turns], **columns: Any) -> list[float | None]:
        pairs = zip(completions, columns[column], strict=True)
        return [None if answer is None else score(completion_text(text), answer) for text, answer in pairs]

    reward.__name__ = name
    # The column is a parameter like any other: a data set without it is refused before the first rollout.
    reward.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            Parameter("completions", Parameter.POSITIONAL_OR_KEYWORD),
            Parameter(column, Parameter.KEYWORD_ONLY),
            Parameter("columns", Parameter.VAR_KEYWORD),
        ]
    )
    return reward


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
