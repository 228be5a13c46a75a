"""Several reward functions on a batch of completions: one total for each, or a report of what went wrong."""

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.data.messages import Turns
from rlhf.rewards.calling import TimedOut, call, finish, is_async, start
from rlhf.rewards.contract import (
    SUPPLIED,
    ContractError,
    Value,
    describe_error,
    parameters_of,
    read_values,
    shorten,
    unique_names,
)
from rlhf.rewards.functions import RewardFunction, completion_text
from rlhf.rewards.loading import load_reward

logger = logging.getLogger(__name__)

# Columns that TRL passes under other names (`prompts`, `completions`), so that they are no columns of the data here.
_RENAMED = ("prompt", "completion", "completion_ids")


class RewardError(ValueError):
    """A reward function failed; names the function, the sample and the reason."""


# No eq: comparing tensors gives a tensor, which has no truth value.
@dataclass(frozen=True, eq=False)
class Scored:
    """The result of a :class:`RewardSet` for B completions and F functions.

    Attributes:
        rewards: [B] float32, weighted sums; NaN where not usable.
        reward_components: [B, F] float32, each function's own value; NaN where it does not apply or failed.
        usable: [B] bool, False for a sample to leave out of baselines and losses.
        names: [F], the functions' names.
        failed: by function, the number of samples that it failed on.
        metrics: means of what functions logged through TRL's ``log_metric``.
        extra: columns of B values that functions logged through TRL's ``log_extra``.
    """

    rewards: Tensor
    reward_components: Tensor
    usable: Tensor
    names: list[str]
    failed: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


class RewardSet:
    """Reward functions with weights, called as one.

    A function is called with TRL's keywords (``prompts``, ``completions``, ``completion_ids``, the columns of the
    data, ``trainer_state``, ``log_extra``, ``log_metric``), or with those it names if it has no ``**``. None from it
    means "not applicable": the sum runs over the others. A sample is usable if a function with a weight applies to it.

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
        # Weights first: models are loaded only where the rest of the call is right.
        self.weights = _checked_weights(weights, len(functions))
        self.functions = [load_reward(spec) if isinstance(spec, str) else spec for spec in functions]
        self.names = unique_names(self.functions)
        self.on_error = on_error
        self.timeout = timeout
        named_functions = zip(self.functions, self.names, strict=True)
        self._parameters = [parameters_of(function, name) for function, name in named_functions]

    def check(self, row: Mapping[str, Any]) -> None:
        """Find out before the first rollout what would fail after it.

        Args:
            row: one row of the data, by column.
        Raises:
            ValueError: a function needs a column that is not there, or its own ``check`` refuses the row.
            OSError: a server that does not answer.
        """
        columns = [name for name in row if name not in _RENAMED]
        # Such a column would reach no function: ours takes its place in the call.
        for name in columns:
            if name in SUPPLIED:
                raise ValueError(
                    f"the data has a column {name!r}, a name under which reward functions get something else: "
                    f"rename the column (--columns {name}=data_{name})"
                )
        available = {*columns, *SUPPLIED}
        for function, name, parameters in zip(self.functions, self.names, self._parameters, strict=True):
            for required in parameters.required:
                if required not in available:
                    column_names = ", ".join(columns) or "–"
                    raise ValueError(
                        f"reward {name!r} needs {required!r}, which is no column of the data: {column_names}"
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
            prompts: B texts, or B lists of messages.
            completions: the same.
            completion_ids: B lists of token ids.
            trainer_state: handed on to the functions.
            **columns: the columns of the data, B values each.
        Returns:
            Totals, the functions' own values, and which samples are usable.
        Raises:
            RewardError: a function failed, under ``on_error="stop"``.
            ValueError: columns of other lengths.
        """
        columns = {name: column for name, column in columns.items() if name not in _RENAMED}
        # Only where there are any: a function that requires them then fails by their name.
        if completion_ids is not None:
            columns["completion_ids"] = completion_ids
        batch = _Batch(prompts, completions, columns, trainer_state)
        batch.check()
        # An empty batch is not passed to the functions: many of them fail on it.
        log = _Log()
        values = self._score(batch, log.callbacks()) if len(batch) else [[] for _ in self.functions]
        for name, column in zip(self.names, values, strict=True):
            self._report(name, column, batch)
        return self._total(values, batch, log)

    def _score(self, batch: "_Batch", callbacks: dict[str, Any]) -> list[list[Value]]:
        """The values of each function; the async ones work while the others do."""
        offered = batch.arguments() | callbacks
        arguments = [parameters.select(offered) for parameters in self._parameters]
        # All async functions are started before any other is called, so that they wait for their servers meanwhile.
        running: dict[int, Future[Any]] = {}
        for index, function in enumerate(self.functions):
            if is_async(function):
                running[index] = start(function, arguments[index], self.timeout)
        values: list[list[Value]] = []
        for index, function in enumerate(self.functions):
            try:
                if index in running:
                    answer = finish(running[index], self.timeout)
                else:
                    answer = call(function, arguments[index], self.timeout)
                values.append(read_values(answer, len(batch)))
            except OSError as error:  # a server or a file: no sample is to blame, and asking again would not help
                values.append([error] * len(batch))
            except Exception as error:
                values.append(self._score_one_by_one(index, batch, error))
        return values

    def _score_one_by_one(self, index: int, batch: "_Batch", error: Exception) -> list[Value]:
        """Find the samples at fault for an error of the whole batch; if none fails alone, all count as failed."""
        if len(batch) == 1:
            return [error]
        timeout = None if self.timeout is None else max(1.0, self.timeout / len(batch))
        # The first call may have logged already: what this one logs would count twice.
        silent_callbacks = dict.fromkeys(("log_metric", "log_extra"), lambda name, value: None)
        values: list[Value] = []
        for row in range(len(batch)):
            try:
                arguments = self._parameters[index].select(batch.row(row).arguments() | silent_callbacks)
                values += read_values(call(self.functions[index], arguments, timeout), 1)
            except Exception as row_error:
                values.append(row_error)
            # One sample at fault is enough to stop: the others are not asked.
            if self.on_error == "stop" and isinstance(values[-1], Exception):
                return values + [None] * (len(batch) - len(values))
        if any(isinstance(value, Exception) for value in values):
            return values
        # No sample fails alone, as where the function is slow on a batch or compares the samples.
        hint = "; raise timeout" if isinstance(error, TimedOut) else ""
        joint_error = ContractError(
            f"{describe_error(error)}, for {len(batch)} samples at once but for none of them alone{hint}"
        )
        # Its traceback shows the line of the function that raised.
        joint_error.__cause__ = error
        return [joint_error] * len(batch)

    def _report(self, name: str, values: list[Value], batch: "_Batch") -> None:
        """Stop at a failed sample, or warn of the failed samples."""
        failures = [(row, value) for row, value in enumerate(values) if isinstance(value, Exception)]
        if not failures:
            return
        row, error = failures[0]
        if self.on_error == "stop":
            raise RewardError(f"reward {name!r} failed on {batch.show(row)}: {describe_error(error)}") from error
        logger.warning(
            "reward %r failed on %d of %d samples, which are left out; the first: %s: %s",
            name, len(failures), len(batch), batch.show(row), describe_error(error),
        )  # fmt: skip

    def _total(self, values: list[list[Value]], batch: "_Batch", log: "_Log") -> Scored:
        """Weighted sums of the functions' values, [F][B], over the functions that apply."""
        shape = len(self.functions), len(batch)
        numbers = [[value if isinstance(value, float) else math.nan for value in column] for column in values]
        failures = [[isinstance(value, Exception) for value in column] for column in values]
        components = torch.tensor(numbers, dtype=torch.float64).view(shape).T
        failed = torch.tensor(failures, dtype=torch.bool).view(shape)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        # A function with weight 0 only logs, so it makes no sample usable.
        applies = (~components.isnan() & (weights != 0)).any(dim=1)  # a sum of nothing is not zero
        has_failure = failed.any(dim=0)
        not_scored = (~applies & ~has_failure).nonzero().flatten().tolist()
        if not_scored:
            logger.warning(
                "no reward applies to %d of %d samples, which are left out; the first: %s",
                len(not_scored), len(batch), batch.show(not_scored[0]),
            )  # fmt: skip
        usable = applies & ~has_failure
        # NaN, where a function does not apply, adds nothing. Unusable samples become NaN, so that no use goes unseen.
        rewards = (components * weights).nansum(dim=1).masked_fill(~usable, math.nan)
        return Scored(
            rewards=rewards.float(),
            reward_components=components.float(),
            usable=usable,
            names=self.names,
            failed=dict(zip(self.names, failed.sum(dim=1).tolist(), strict=True)),
            metrics=log.means(),
            extra=log.extra,
        )


class _Log:
    """What functions log of a batch through TRL's ``log_metric`` and ``log_extra``."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extra: dict[str, list[Any]] = {}

    def callbacks(self) -> dict[str, Any]:
        return {"log_metric": self._log_metric, "log_extra": self._log_extra}

    def _log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def _log_extra(self, name: str, values: Sequence[Any]) -> None:
        self.extra[name] = list(values)

    def means(self) -> dict[str, float]:
        return {name: math.fsum(values) / len(values) for name, values in self.metrics.items()}


@dataclass
class _Batch:
    """B samples with the columns of the data."""

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
        return {
            **self.columns,
            "prompts": self.prompts,
            "completions": self.completions,
            "trainer_state": self.trainer_state,
        }

    def row(self, index: int) -> "_Batch":
        """A batch of one sample."""
        # A slice, not an index: functions get lists of one, as of many.
        one_sample = slice(index, index + 1)
        columns = {name: column[one_sample] for name, column in self.columns.items()}
        return _Batch(self.prompts[one_sample], self.completions[one_sample], columns, self.trainer_state)

    def show(self, row: int) -> str:
        """A sample as a message tells it: its number, and the ends of its prompt and completion."""
        prompt, completion = self.prompts[row], completion_text(self.completions[row])
        if not isinstance(prompt, str):
            prompt = str(prompt[-1].get("content")) if prompt else ""
        return f"sample {row + 1} of {len(self)} (prompt {shorten(prompt)!r}, completion {shorten(completion)!r})"


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} rewards: give one for each")
    # Weights of 0 alone would leave every sample unusable.
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise ValueError(f"weights must be finite and not all 0, got {list(weights)}")
    return [float(weight) for weight in weights]
