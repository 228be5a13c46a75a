"""The contract of a reward function: the parameters it takes, and the values it may return."""

import inspect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from inspect import Parameter
from numbers import Real
from typing import Any

from torch import Tensor

from rlhf.rewards.calling import TimedOut
from rlhf.rewards.functions import RewardFunction

SUPPLIED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Keywords that every reward function is offered, besides the columns of the data."""

Value = float | None | Exception
"""The result of one function for one sample: a number, None (not applicable), or why it failed."""

_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


class ContractError(Exception):
    """A reward function returned something else than one finite number (or None) for each sample."""


@dataclass(frozen=True)
class Parameters:
    """The keyword arguments that a reward function takes.

    Attributes:
        named: parameters that can be given by keyword.
        required: those of them without a default.
        takes_any: whether the function has ``**columns``.
    """

    named: tuple[str, ...]
    required: tuple[str, ...]
    takes_any: bool

    def select(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Those of ``arguments`` that the function takes."""
        if self.takes_any:
            return arguments
        return {name: value for name, value in arguments.items() if name in self.named}


def parameters_of(function: RewardFunction, name: str) -> Parameters:
    """Read the signature of a reward function.

    Args:
        function: the reward function.
        name: its name, for messages.
    Returns:
        The keyword arguments that it takes.
    Raises:
        ValueError: it is not callable, takes an argument by position only, or takes no completions.
    """
    if not callable(function):
        raise ValueError(f"a reward is a function, a name or a path; got {function!r}")
    parameters = inspect.signature(function).parameters.values()
    required = [parameter for parameter in parameters if _is_required(parameter)]
    # Called with keywords, such a function would fail on every batch.
    for parameter in required:
        if parameter.kind is Parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"reward {name!r} takes {parameter.name!r} by position only; rewards are called with keywords"
            )
    keyword_names = tuple(parameter.name for parameter in parameters if parameter.kind in _NAMED)
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
    # A factory that was not called has neither: without this check its first call would fail after a whole rollout.
    if not takes_any and not {"completions", "completion_ids"} & set(keyword_names):
        raise ValueError(
            f"reward {name!r} takes {', '.join(keyword_names) or 'nothing'}, so it would see no completion: expected "
            f"`def {name}(completions, **columns)` (call a factory to get its function: {name}(…))"
        )
    return Parameters(keyword_names, tuple(parameter.name for parameter in required), takes_any)


def _is_required(parameter: Parameter) -> bool:
    return parameter.default is Parameter.empty and parameter.kind not in _VARIADIC


def unique_names(functions: Sequence[Any]) -> list[str]:
    """Name each function; the second of two with the same name gets a number, as in ``length`` and ``length_2``."""
    names: list[str] = []
    occurrences: Counter[str] = Counter()
    for function in functions:
        # Objects such as HttpReward set `__name__`; others are named after their class.
        wrapped_function = function.func if isinstance(function, partial) else function
        name = getattr(wrapped_function, "__name__", type(wrapped_function).__name__)
        occurrences[name] += 1
        names.append(name if occurrences[name] == 1 else f"{name}_{occurrences[name]}")
    return names


def read_values(answer: Any, count: int) -> list[Value]:
    """Read what a reward function returned.

    Args:
        answer: a sequence, an array, or a tensor.
        count: number of samples that it was called with.
    Returns:
        One value for each sample; an exception takes the place of a value that is no finite number.
    Raises:
        ContractError: the answer as a whole is not a list of ``count`` values.
    """
    if hasattr(answer, "tolist"):  # a tensor or an array
        answer = answer.tolist()
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        raise ContractError(f"it returned a {type(answer).__name__}, expected a list of {count} numbers")
    if len(answer) != count:
        raise ContractError(f"it returned {len(answer)} values, expected {count}")
    return [_read_value(value) for value in answer]


def _read_value(value: Any) -> Value:
    if value is None:
        return None
    if isinstance(value, Tensor) and value.numel() == 1:  # a list of tensors, as from a loop over a model
        value = value.item()
    if not isinstance(value, Real):
        return ContractError(f"it returned {shorten(repr(value))}, a {type(value).__name__}, expected a number")
    # A NaN in one reward would spread over its whole group of samples.
    if not math.isfinite(value):
        return ContractError(f"it returned {float(value)}, expected a finite number (None where it does not apply)")
    return float(value)


def describe_error(error: Exception) -> str:
    """An error in one line; the type is named only where the reward function itself raised it."""
    message = " ".join(str(error).split())
    # Our own errors are whole sentences; of another, "KeyError: 'x'" says more than "'x'".
    is_ours = isinstance(error, TimedOut | ContractError)
    return message if is_ours else f"{type(error).__name__}: {message}"


def shorten(text: str, length: int = 100) -> str:
    """``text`` in one line of at most ``length`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
