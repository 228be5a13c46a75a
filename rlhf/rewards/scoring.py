"""Several reward functions on a batch of completions: one total for each, or a report of what went wrong."""

import inspect
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from inspect import Parameter
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.data.formats import Turns
from rlhf.rewards.calling import TimedOut, call, finish, is_async, start
from rlhf.rewards.functions import RewardFunction, completion_text
from rlhf.rewards.loading import load_reward

logger = logging.getLogger(__name__)

_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
Value = float | None | Exception  # of one function for one sample


class RewardError(ValueError):
    """A reward function failed; names the function, the sample and the reason."""


class _Fault(Exception):
    """Ours, not raised by the function."""


@dataclass(frozen=True, eq=False)
class Scored:
    """What a :class:`RewardSet` says about B completions.

    ``rewards`` [B] float32: weighted sums, NaN where not usable. ``each`` [B, F] float32: the functions' own values,
    NaN where one does not apply or failed. ``usable`` [B] bool: False for a sample to leave out of baselines and
    losses. ``failed``: the number of samples that each function failed on. ``metrics`` and ``extra``: what functions
    logged through TRL's ``log_metric`` (means) and ``log_extra`` (columns of B).
    """

    rewards: Tensor
    each: Tensor
    usable: Tensor
    names: list[str]
    failed: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


class RewardSet:
    """Reward functions with weights, called as one.

    A function is called with TRL's keywords (``prompts``, ``completions``, ``completion_ids``, the columns of the
    data, ``trainer_state``, ``log_extra``, ``log_metric``), or with those it names if it has no ``**``. None from it
    means "not applicable": the sum runs over the others. A sample for which no function with a weight applies is not
    usable.

    A function fails on a sample if it raises, gives no answer in time, or returns NaN, an infinity, no number, or the
    wrong number of values. A batch that fails is scored again one sample at a time to find those at fault, each with
    its share of the time limit (at least a second); with ``"drop"`` the others keep these scores, so a function that
    compares samples needs ``"stop"``. An ``OSError`` (a server, a file) blames no sample: all fail.

    Args:
        functions: functions, async ones too, or what :func:`~rlhf.rewards.load_reward` loads by name.
        weights: one for each function; 1 by default. 0 only logs.
        on_error: ``"stop"`` raises :class:`RewardError`; ``"drop"`` warns, counts, and leaves the sample unusable.
        timeout: seconds for one call of one function; None waits for ever. How it ends: ``rlhf.rewards.calling``.
    Raises:
        ValueError: a function that cannot be called so; weights that do not fit.
    Example:
        >>> rewards = RewardSet([lambda completions, **_: [len(c) for c in completions], "exact_match"], [0.1, 1.0])
        >>> rewards(["a", "b"], ["yes", "no"], answer=["yes", None]).rewards
        tensor([1.3000, 0.2000])
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction | str],
        weights: Sequence[float] | None = None,
        *,
        on_error: Literal["stop", "drop"] = "stop",
        timeout: float | None = 300.0,
    ) -> None:
        if isinstance(functions, str) or not functions:
            raise ValueError(f"functions must be a list with at least one reward, got {functions!r}")
        if on_error not in ("stop", "drop"):
            raise ValueError(f"on_error must be stop or drop, got {on_error!r}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be positive or None, got {timeout}")
        self.weights = _checked_weights(weights, len(functions))
        self.functions = [load_reward(f) if isinstance(f, str) else f for f in functions]
        self.names = _names(self.functions)
        self.on_error = on_error
        self.timeout = timeout
        self._parameters = [_parameters(f, name) for f, name in zip(self.functions, self.names, strict=True)]

    def check(self, row: Mapping[str, Any]) -> None:
        """Find out before the first rollout what would fail after it, from one row of the data.

        Raises:
            ValueError: a function needs a column that is not there, or says itself that it cannot work.
            OSError: a server that does not answer.
        """
        columns = [name for name in row if name not in _RENAMED]
        for name in columns:
            if name in _GIVEN:
                raise ValueError(
                    f"the data has a column {name!r}, a name under which reward functions get something else: "
                    f"rename the column (--columns {name}=data_{name})"
                )
        for function, name, parameters in zip(self.functions, self.names, self._parameters, strict=True):
            for needed in parameters.required:
                if needed not in columns and needed not in _GIVEN:
                    raise ValueError(
                        f"reward {name!r} needs {needed!r}, which is no column of the data: {', '.join(columns) or '–'}"
                    )
            if hasattr(function, "check"):
                function.check(row)

    def __call__(
        self,
        prompts: Sequence[Turns],
        completions: Sequence[Turns],
        completion_ids: Sequence[Sequence[int]] | None = None,
        trainer_state: Any = None,
        **columns: Sequence[Any],
    ) -> Scored:
        """Score B completions.

        Args:
            prompts, completions: B texts, or B lists of messages.
            completion_ids: B lists of token ids.
            trainer_state: handed on.
            columns: the columns of the data, B values each.
        Raises:
            RewardError: a function failed, under ``on_error="stop"``.
            ValueError: columns of other lengths.
        """
        batch = _Batch(prompts, completions, {k: v for k, v in columns.items() if k not in _RENAMED}, trainer_state)
        if completion_ids is not None:
            batch.columns["completion_ids"] = completion_ids
        batch.check()
        metrics: dict[str, list[float]] = {}
        extra: dict[str, list[Any]] = {}
        sinks = dict(
            log_metric=lambda name, value: metrics.setdefault(name, []).append(float(value)),
            log_extra=lambda name, values: extra.__setitem__(name, list(values)),
        )
        values = self._score(batch, sinks) if len(batch) else [[] for _ in self.functions]
        for name, column in zip(self.names, values, strict=True):
            self._report(name, column, batch)
        return self._total(values, batch, {k: math.fsum(v) / len(v) for k, v in metrics.items()}, extra)

    def _score(self, batch: "_Batch", sinks: dict[str, Any]) -> list[list[Value]]:
        """The values of each function; the async ones work while the others do."""
        arguments = [parameters.pick(batch.arguments() | sinks) for parameters in self._parameters]
        started: dict[int, Future[Any]] = {
            i: start(function, arguments[i], self.timeout)
            for i, function in enumerate(self.functions)
            if is_async(function)
        }
        values = []
        for i, function in enumerate(self.functions):
            try:
                if i in started:
                    answer = finish(started[i], self.timeout)
                else:
                    answer = call(function, arguments[i], self.timeout)
                values.append(_read(answer, len(batch)))
            except OSError as error:
                values.append([error] * len(batch))
            except Exception as error:
                values.append(self._one_by_one(i, batch, error))
        return values

    def _one_by_one(self, i: int, batch: "_Batch", error: Exception) -> list[Value]:
        """Who is at fault for an error of the whole batch; if no sample alone is, all are."""
        if len(batch) == 1:
            return [error]
        share = None if self.timeout is None else max(1.0, self.timeout / len(batch))
        unlogged = dict.fromkeys(("log_metric", "log_extra"), lambda name, value: None)
        values: list[Value] = []
        for row in range(len(batch)):
            try:
                arguments = self._parameters[i].pick(batch.row(row).arguments() | unlogged)
                values += _read(call(self.functions[i], arguments, share), 1)
            except Exception as own:
                values.append(own)
            if self.on_error == "stop" and isinstance(values[-1], Exception):
                return values + [None] * (len(batch) - len(values))
        if any(isinstance(value, Exception) for value in values):
            return values
        hint = "; raise timeout" if isinstance(error, TimedOut) else ""
        whole = _Fault(f"{_said(error)}, for {len(batch)} samples at once but for none of them alone{hint}")
        whole.__cause__ = error
        return [whole] * len(batch)

    def _report(self, name: str, values: list[Value], batch: "_Batch") -> None:
        faults = [(row, value) for row, value in enumerate(values) if isinstance(value, Exception)]
        if not faults:
            return
        row, error = faults[0]
        if self.on_error == "stop":
            raise RewardError(f"reward {name!r} failed on {batch.show(row)}: {_said(error)}") from error
        logger.warning(
            "reward %r failed on %d of %d samples, which are left out; the first: %s: %s",
            name, len(faults), len(batch), batch.show(row), _said(error),
        )  # fmt: skip

    def _total(
        self, values: list[list[Value]], batch: "_Batch", metrics: dict[str, float], extra: dict[str, list[Any]]
    ) -> Scored:
        numbers = [[value if isinstance(value, float) else math.nan for value in column] for column in values]
        each = torch.tensor(numbers, dtype=torch.float64).view(len(self.functions), len(batch)).T
        failed = torch.tensor([[isinstance(v, Exception) for v in column] for column in values], dtype=torch.bool)
        failed = failed.view(len(self.functions), len(batch))
        weights = torch.tensor(self.weights, dtype=torch.float64)
        applies = (~each.isnan() & (weights != 0)).any(dim=1)  # a sum of nothing is not zero
        broken = failed.any(dim=0)
        idle = (~applies & ~broken).nonzero().flatten().tolist()
        if idle:
            logger.warning(
                "no reward applies to %d of %d samples, which are left out; the first: %s",
                len(idle), len(batch), batch.show(idle[0]),
            )  # fmt: skip
        usable = applies & ~broken
        rewards = (each * weights).nansum(dim=1).masked_fill(~usable, math.nan)
        counts = dict(zip(self.names, failed.sum(dim=1).tolist(), strict=True))
        return Scored(rewards.float(), each.float(), usable, self.names, counts, metrics, extra)


# TRL hands these on under other names.
_RENAMED = ("prompt", "completion", "completion_ids")


@dataclass
class _Batch:
    prompts: Sequence[Turns]
    completions: Sequence[Turns]
    columns: dict[str, Sequence[Any]]
    trainer_state: Any

    def __len__(self) -> int:
        return len(self.prompts)

    def check(self) -> None:
        for name, column in {"completions": self.completions, **self.columns}.items():
            if len(column) != len(self):
                raise ValueError(f"{len(self)} prompts, but {len(column)} values in {name!r}")

    def arguments(self) -> dict[str, Any]:
        own = dict(prompts=self.prompts, completions=self.completions, trainer_state=self.trainer_state)
        return {**self.columns, **own}

    def row(self, index: int) -> "_Batch":
        one = slice(index, index + 1)
        columns = {name: column[one] for name, column in self.columns.items()}
        return _Batch(self.prompts[one], self.completions[one], columns, self.trainer_state)

    def show(self, row: int) -> str:
        prompt = self.prompts[row]
        last = prompt if isinstance(prompt, str) else str(prompt[-1].get("content")) if prompt else ""
        answer = completion_text(self.completions[row])
        return f"sample {row + 1} of {len(self)} (prompt {_short(last)!r}, completion {_short(answer)!r})"


@dataclass(frozen=True)
class _Parameters:
    named: tuple[str, ...]
    required: tuple[str, ...]
    anything: bool  # it has **

    def pick(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return arguments if self.anything else {k: v for k, v in arguments.items() if k in self.named}


def _parameters(function: RewardFunction, name: str) -> _Parameters:
    if not callable(function):
        raise ValueError(f"a reward is a function, a name or a path; got {function!r}")
    found = inspect.signature(function).parameters.values()
    required = [p for p in found if p.default is Parameter.empty and p.kind not in _VARIADIC]
    by_position = next((p.name for p in required if p.kind is Parameter.POSITIONAL_ONLY), None)
    if by_position is not None:
        raise ValueError(f"reward {name!r} takes {by_position!r} by position only; rewards are called with keywords")
    named = tuple(p.name for p in found if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY))
    anything = any(p.kind is Parameter.VAR_KEYWORD for p in found)
    if not anything and not {"completions", "completion_ids"} & set(named):
        raise ValueError(
            f"reward {name!r} takes {', '.join(named) or 'nothing'}, so it would see no completion: expected "
            f"`def {name}(completions, **columns)` (call a factory to get its function: {name}(…))"
        )
    return _Parameters(named, tuple(p.name for p in required), anything)


_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def _names(functions: Sequence[Any]) -> list[str]:
    """A name for each; of two with the same name, the second gets a number."""
    names: list[str] = []
    seen: Counter[str] = Counter()
    for function in functions:
        inner = function.func if isinstance(function, partial) else function
        name = getattr(inner, "__name__", type(inner).__name__)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} rewards: give one for each")
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise ValueError(f"weights must be finite and not all 0, got {list(weights)}")
    return [float(weight) for weight in weights]


def _read(answer: Any, count: int) -> list[Value]:
    """One value for each sample; an exception in the place of one that is no finite number."""
    if hasattr(answer, "tolist"):  # a tensor, an array
        answer = answer.tolist()
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        raise _Fault(f"it returned a {type(answer).__name__}, expected a list of {count} numbers")
    if len(answer) != count:
        raise _Fault(f"it returned {len(answer)} values, expected {count}")
    return [_read_value(value) for value in answer]


def _read_value(value: Any) -> Value:
    if value is None:
        return None
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, Real):
        return _Fault(f"it returned {_short(repr(value))}, a {type(value).__name__}, expected a number")
    if not math.isfinite(value):
        return _Fault(f"it returned {float(value)}, expected a finite number (None where it does not apply)")
    return float(value)


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, TimedOut | _Fault) else f"{type(error).__name__}: {text}"


def _short(text: str, length: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
