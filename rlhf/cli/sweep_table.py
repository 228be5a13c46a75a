"""The table of a sweep: a row for each combination of options, means over seeds, the best first."""

import statistics
from collections.abc import Mapping, Sequence

from rlhf.cli.sweep_grid import SEED
from rlhf.runs.comparable import comparable_metrics, lower_is_better
from rlhf.runs.figures import EVALUATION

MAX_COLUMNS = 3  # metrics
Point = tuple[Mapping[str, str], Mapping[str, float]]
"""The swept options of a run, and its figures."""


def sweep_table(runs: Sequence[Point], swept: Sequence[str], metric: str | None) -> list[str]:
    """The results of a sweep.

    Args:
        runs: that are finished.
        swept: names of the options in which they differ.
        metric: to sort by; None for the first one that compares across the sweep.

    Returns:
        Lines of text.

    Raises:
        ValueError: no run has this metric.
    """
    if not runs:
        return ["no run is finished"]
    figures = [values for _, values in runs]
    comparable = comparable_metrics(figures, swept)
    if metric is not None and not all(metric in values for values in figures):
        known = ", ".join(sorted(figures[0]))
        raise ValueError(f"--metric {metric}: not every run has it; the first run has {known}")
    chosen = metric or next(iter(comparable), None)
    if chosen is None:
        return ["no metric compares across these runs: evaluate them (--eval_dataset_name), or pass --metric"]
    names = _columns(chosen, comparable)
    groups = _over_seeds(runs)
    sign = 1 if lower_is_better(chosen) else -1
    groups.sort(key=lambda group: sign * statistics.fmean(values[chosen] for values in group[1]))
    options = [name for name in swept if name != SEED]
    has_seeds = any(len(values) > 1 for _, values in groups)
    rows = [[*options, *(["seeds"] if has_seeds else []), *names]]
    for point, seeds in groups:
        count = [str(len(seeds))] if has_seeds else []
        cells = [_mean(name, seeds) for name in names]
        rows.append([*(point[name] for name in options), *count, *cells])
    direction = "the lowest" if sign > 0 else "the highest"
    spread = "; mean ± standard deviation over seeds" if has_seeds else ""
    return [*_aligned(rows), f"sorted by {chosen}, {direction} first{spread}"]


def _columns(chosen: str, comparable: Sequence[str]) -> list[str]:
    """The metric to sort by, and others that compare; a metric of training only where it was not evaluated."""
    names = [chosen]
    for name in comparable:
        if name not in names and f"{EVALUATION}{name}" not in comparable:
            names.append(name)
    return names[:MAX_COLUMNS]


def _over_seeds(runs: Sequence[Point]) -> list[tuple[Mapping[str, str], list[Mapping[str, float]]]]:
    """The runs that differ in their seed alone, together."""
    groups: dict[tuple[tuple[str, str], ...], list[Mapping[str, float]]] = {}
    for options, figures in runs:
        point = tuple((name, value) for name, value in options.items() if name != SEED)
        groups.setdefault(point, []).append(figures)
    return [(dict(point), figures) for point, figures in groups.items()]


def _mean(name: str, figures: Sequence[Mapping[str, float]]) -> str:
    values = [values[name] for values in figures]
    mean = f"{statistics.fmean(values):.4g}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
