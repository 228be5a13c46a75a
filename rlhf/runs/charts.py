"""The charts of a report: which series are drawn together, thinned to what a screen can show."""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from rlhf.runs.figures import EVALUATION, Figures, Series
from rlhf.runs.metric_names import CHARTS, ChartPlan, describe, split_name

MAX_BUCKETS = 300  # of steps; two points of each line are kept in a bucket
DECADES = 1.0  # that values span before their scale is logarithmic
_DIGITS = 5
_OTHER = "Other figures"
# Bookkeeping, or drawn in another form.
NOT_DRAWN = ("epoch", "step", "seconds", "num_tokens", "total_flos", "train_*", "*runtime", "*_per_second",
             "completions/eos_ratio")  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        label: for the legend.
        run: position of the run.
        kind: position of the metric and its split in the chart.
        is_evaluation: drawn with points, as there are few.
        series: what is drawn.
    """

    label: str
    run: int
    kind: int
    is_evaluation: bool
    series: Series


@dataclass(frozen=True)
class Chart:
    """A chart of a report.

    Attributes:
        title: in words.
        names: of the metrics.
        unit: of the values; empty for a plain number.
        lines: at least one, with at least two values.
        is_log: whether the scale of values is logarithmic.
    """

    title: str
    names: tuple[str, ...]
    unit: str
    lines: tuple[Line, ...]
    is_log: bool

    @property
    def summary(self) -> str:
        """The beginning and the end of each line, in words."""
        parts = []
        for line in self.lines:
            first, last = line.series.values[0], line.series.values[-1]
            parts.append(f"{line.label}: {short(first)} → {short(last)}")
        return "; ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The data of the chart for the page.

        Returns:
            ``steps``, ``lines`` with a value or null for each step, and ``log``.
        """
        series = [thinned(line.series) for line in self.lines]
        steps = sorted({step for entry in series for step in entry.steps})
        lines = []
        for line, entry in zip(self.lines, series, strict=True):
            by_step = dict(zip(entry.steps, entry.values, strict=True))
            values = [_rounded(by_step[step]) if step in by_step else None for step in steps]
            lines.append(
                {"label": line.label, "run": line.run, "kind": line.kind, "eval": line.is_evaluation, "values": values}
            )
        return {"steps": steps, "log": self.is_log, "lines": lines, "title": self.title}


def charts_of(figures: Sequence[Figures]) -> dict[str, list[Chart]]:
    """The charts of one or several runs.

    Args:
        figures: of the runs whose curves are drawn over each other.

    Returns:
        By heading, in the order of the page; nothing empty.
    """
    names = list(dict.fromkeys(name for entry in figures for name in entry.names))
    groups: dict[str, list[Chart]] = {}
    drawn: set[str] = set()
    for heading, plans in CHARTS.items():
        for plan in plans:
            members = [name for name in names if name not in drawn and _belongs(name, plan)]
            # In the order of the plan, training before evaluation.
            members.sort(key=lambda name: (_position(name, plan), name.startswith(EVALUATION)))
            drawn |= set(members)
            _add_chart(groups, heading, plan, members, figures)
    for name in names:
        metric = split_name(name).metric
        if name in drawn or any(fnmatchcase(metric, pattern) for pattern in NOT_DRAWN):
            continue
        members = [other for other in names if split_name(other).metric == metric]
        drawn |= set(members)
        _add_chart(groups, _OTHER, ChartPlan(describe(metric).title, (metric,)), members, figures)
    return groups


def constant_figures(figures: Figures) -> dict[str, float]:
    """Figures that never changed, or have one value: a line of text shows them better than a chart.

    Args:
        figures: of a run.

    Returns:
        By name.
    """
    series = {name: figures.series(name) for name in figures.names if not _is_bookkeeping(name)}
    return {name: entry.values[-1] for name, entry in series.items() if entry.is_constant}


def thinned(series: Series, buckets: int = MAX_BUCKETS) -> Series:
    """A series with fewer values: the smallest and the largest of each bucket of steps, so that spikes stay.

    Args:
        series: of any length.
        buckets: their number.

    Returns:
        The same where it is short enough.
    """
    if len(series) <= 2 * buckets:
        return series
    first, last = series.steps[0], series.steps[-1]
    width = (last - first + 1) / buckets
    kept = {0, len(series) - 1}
    start = 0
    for bucket in range(1, buckets + 1):
        end = bisect.bisect_left(series.steps, first + bucket * width, start)
        if end > start:
            positions = range(start, end)
            kept |= {min(positions, key=series.values.__getitem__), max(positions, key=series.values.__getitem__)}
        start = end
    in_order = sorted(kept)
    return Series(
        series.name,
        tuple(series.steps[position] for position in in_order),
        tuple(series.values[position] for position in in_order),
    )


def short(value: float) -> str:
    """A figure of four significant digits.

    Args:
        value: of a metric.

    Returns:
        Such as ``0.6931`` or ``1.2e-05``.
    """
    return f"{value:.4g}"


def repeats_another(series: Series, figures: Figures) -> bool:
    """Whether a series is drawn in another chart: the only reward function as the reward, the only loss as the loss.

    Args:
        series: of the run.
        figures: of the run.

    Returns:
        True where it would be drawn, or written, twice.
    """
    metric, split = split_name(series.name)
    first, _, last = metric.rpartition("/")
    wholes = {"mean": "reward", "std": "reward_std", "policy_loss": "loss"}
    if last not in wholes or split.startswith("eval ") or (first and not first.startswith("rewards/")):
        return False
    prefix = EVALUATION if split == "eval" else ""
    whole = figures.series(prefix + wholes[last])
    return series.steps == whole.steps and all(
        math.isclose(value, other, rel_tol=1e-4) for value, other in zip(series.values, whole.values, strict=True)
    )


def _add_chart(
    groups: dict[str, list[Chart]], heading: str, plan: ChartPlan, members: Sequence[str], figures: Sequence[Figures]
) -> None:
    lines = []
    for position, entry in enumerate(figures):
        for kind, name in enumerate(members):
            series = entry.series(name)
            if len(series) > 1 and not repeats_another(series, entry):
                label = _label(name, members, entry.run.name if len(figures) > 1 else None)
                lines.append(Line(label, position, kind, name.startswith(EVALUATION), series))
    values = [value for line in lines for value in line.series.values]
    # A flat line says no more than its figure, which stands in the text.
    if len(set(values)) < 2:
        return
    units = {describe(split_name(line.series.name).metric).unit for line in lines}
    names = tuple(dict.fromkeys(line.series.name for line in lines))
    unit = units.pop() if len(units) == 1 else ""
    is_log = plan.scale == "auto" and _spans_decades(values)
    groups.setdefault(heading, []).append(Chart(plan.title, names, unit, tuple(lines), is_log))


def _label(name: str, members: Sequence[str], run_name: str | None) -> str:
    """What tells a line from the others of its chart."""
    metric, split = split_name(name)
    metrics = {split_name(member).metric for member in members}
    splits = {split_name(member).split for member in members}
    parts = [run_name] if run_name else []
    if len(metrics) > 1 or (len(splits) == 1 and run_name is None):
        parts.append(describe(metric).title)
    if len(splits) > 1:
        parts.append(split)
    return ", ".join(parts) or split


def _belongs(name: str, plan: ChartPlan) -> bool:
    return _position(name, plan) < len(plan.metrics)


def _position(name: str, plan: ChartPlan) -> int:
    metric = split_name(name).metric
    matches = (position for position, pattern in enumerate(plan.metrics) if _matches(metric, pattern))
    return next(matches, len(plan.metrics))


def _matches(metric: str, pattern: str) -> bool:
    # A name of a reward function may hold brackets, which are no pattern here.
    return fnmatchcase(metric, pattern) if "*" in pattern else metric == pattern


def _is_bookkeeping(name: str) -> bool:
    return any(fnmatchcase(split_name(name).metric, pattern) for pattern in NOT_DRAWN)


def _spans_decades(values: Iterable[float]) -> bool:
    positive = list(values)
    smallest, largest = min(positive), max(positive)
    return smallest > 0 and math.log10(largest / smallest) >= DECADES


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
