"""The figures of a run as series over its steps."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeGuard

from rlhf.runs.files import Run

EVALUATION = "eval_"  # in front of the metrics of an evaluation
_END_SHARE = 0.2  # of the values, at each end of a series
_ONLINE_METRICS = ("policy_loss", "frac_not_learned", "completions/eos_ratio")


class Change(NamedTuple):
    """How a series changed from its first fifth to its last.

    Attributes:
        before: mean of the first fifth of the values.
        after: mean of the last fifth.
        error: standard error of the difference, from the differences of neighbouring values.
    """

    before: float
    after: float
    error: float

    @property
    def difference(self) -> float:
        """After minus before."""
        return self.after - self.before

    def is_clear(self, errors: float = 3.0) -> bool:
        """Whether the difference is larger than noise explains.

        Args:
            errors: how many standard errors a clear difference has.

        Returns:
            True for a clear difference.
        """
        return abs(self.difference) > errors * self.error


@dataclass(frozen=True)
class Series:
    """The finite values of a metric.

    Attributes:
        name: of the metric, with ``eval_`` in front where it is of an evaluation.
        steps: ascending.
        values: one for each step.
    """

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def is_constant(self) -> bool:
        """Whether all values are the same."""
        return len(set(self.values)) <= 1

    def end(self, share: float = _END_SHARE) -> tuple[float, ...]:
        """The last values.

        Args:
            share: of all values; at least one is taken.

        Returns:
            Those values.
        """
        return self.values[-_count(len(self), share) :]

    def change(self) -> Change:
        """Compare the first fifth with the last.

        Returns:
            Both means, and the noise of their difference.
        """
        number = _count(len(self), _END_SHARE)
        before, after = statistics.fmean(self.values[:number]), statistics.fmean(self.values[-number:])
        # Neighbours share the trend, so that their differences hold the noise alone (von Neumann 1941).
        squares = [(later - earlier) ** 2 for earlier, later in zip(self.values, self.values[1:], strict=False)]
        noise = math.sqrt(statistics.fmean(squares) / 2) if squares else 0.0
        return Change(before, after, noise * math.sqrt(2 / number))


class Figures:
    """All series of a run.

    Args:
        run: as its folder describes it.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def all_series(self) -> dict[str, Series]:
        """All series by name, in the order of the log. Where a step has a metric twice, the last value counts."""
        # A long run has millions of numbers: they are read once.
        by_name: dict[str, dict[int, float]] = {}
        for line in [*self.run.metrics, *_speeds(self.run.metrics)]:
            step = int(line.get("step", 0))
            for name, value in line.items():
                if is_finite_number(value):
                    by_name.setdefault(name, {})[step] = float(value)
        return {name: _as_series(name, by_step) for name, by_step in by_name.items()}

    def series(self, name: str) -> Series:
        """The series of a metric; empty where the run does not have it.

        Args:
            name: of the metric.

        Returns:
            Its finite values.
        """
        return self.all_series.get(name) or Series(name, (), ())

    def evaluated(self, name: str) -> Series:
        """The series of an evaluation where it has at least two values, else that of training.

        Args:
            name: of the metric, without ``eval_``.

        Returns:
            One of both.
        """
        of_evaluation = self.series(EVALUATION + name)
        return of_evaluation if len(of_evaluation) > 1 else self.series(name)

    @property
    def names(self) -> list[str]:
        """Names of all metrics with a finite value, in the order of the log."""
        return list(self.all_series)

    @property
    def is_online(self) -> bool:
        """Whether the model learned from rewards of its own completions: the loss measures no progress then."""
        return any(name in self.all_series for name in _ONLINE_METRICS)

    @property
    def last_step(self) -> int:
        """The last step of the log."""
        return max((int(line.get("step", 0)) for line in self.run.metrics), default=0)

    def lines_with(self, name: str) -> list[dict[str, Any]]:
        """The lines of the log that have a metric, whether it is finite or not.

        Args:
            name: of the metric.

        Returns:
            Those lines, in their order.
        """
        return [line for line in self.run.metrics if name in line]


def is_finite_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a line can be drawn.

    Args:
        value: of JSON.

    Returns:
        False for text, booleans, null, and what is not finite.
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _as_series(name: str, by_step: dict[int, float]) -> Series:
    steps = tuple(sorted(by_step))
    return Series(name, steps, tuple(by_step[step] for step in steps))


def _speeds(metrics: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Tokens per second between two lines of training."""
    speeds = []
    before: tuple[float, float] | None = None  # tokens and seconds where the interval began
    for line in metrics:
        tokens, seconds = line.get("num_tokens"), line.get("seconds")
        if is_finite_number(tokens) and is_finite_number(seconds) and "loss" in line:
            if before is not None and seconds > before[1]:
                speed = (tokens - before[0]) / (seconds - before[1])
                speeds.append({"step": line.get("step", 0), "tokens_per_second": speed})
            before = tokens, seconds
        elif is_finite_number(seconds) and before is not None:
            before = before[0], seconds  # the time of an evaluation is not that of training
    return speeds


def median_before(values: Sequence[float], position: int, number: int) -> float | None:
    """The median of the values just before a position.

    Args:
        values: of a series.
        position: in it.
        number: of values.

    Returns:
        None where there are fewer values before it.
    """
    return statistics.median(values[position - number : position]) if position >= number else None


def _count(length: int, share: float) -> int:
    return max(1, round(length * share))
