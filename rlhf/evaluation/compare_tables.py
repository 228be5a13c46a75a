"""A comparison of two models on a terminal and as plain values for JSON."""

import math
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf.evaluation.comparison import Comparison, Figure
from rlhf.visible import visible

NO_VALUE = "–"


def show_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the figures of both models with intervals and p-values, and what they mean.

    Args:
        comparison: The comparison.
        console: Where to print; a new one by default.
    """
    console = console or Console()
    for line in heading(comparison):
        console.print(Text(visible(line)))
    figure_table = Table("", "A", "B", "95 % interval", "p", "n")
    for column in figure_table.columns[1:]:
        column.justify = "right"
    for figure in comparison.figures:
        figure_table.add_row(*cells(figure))
    console.print(figure_table)
    for remark in comparison.remarks:
        console.print(Text(visible(remark)))


def heading(comparison: Comparison) -> list[str]:
    """The lines above the table: who A and B are, on which data, judged by whom.

    Args:
        comparison: The comparison.

    Returns:
        Lines of text.
    """
    lines = [f"A: {comparison.names[0]}", f"B: {comparison.names[1]}", f"data: {comparison.data}"]
    if comparison.judge is not None:
        lines.append(f"judge: {comparison.judge}")
    return lines


def cells(figure: Figure) -> tuple[str, str, str, str, str, str]:
    """The cells of a figure: name, A, B, interval, p-value, number of prompts.

    Args:
        figure: The figure.

    Returns:
        Texts.
    """
    interval = p_value = ""
    if figure.estimate is not None:
        of = "B" if figure.estimates_b else "B − A"
        low, high = (_number(end * figure.scale) for end in (figure.estimate.low, figure.estimate.high))
        interval = f"{of} [{low}, {high}]"
        p_value = _p_value(figure.estimate.p_value)
    a, b = (NO_VALUE if value is None else _number(value * figure.scale) for value in (figure.a, figure.b))
    return (figure.name, a, b, interval, p_value, f"{figure.count:,}")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _p_value(value: float) -> str:
    if math.isnan(value):
        return NO_VALUE
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def as_plain(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON writes it.

    Args:
        comparison: The comparison.

    Returns:
        Nested lists and dictionaries; docs/compare.md describes the keys.
    """
    figures = [_plain_figure(figure) for figure in comparison.figures]
    answers = []
    per_prompt = zip(comparison.questions, *comparison.answers, comparison.verdicts, strict=True)
    for question, a, b, verdict in per_prompt:
        row: dict[str, Any] = {"prompt": question.dialogue.prompt, "a": a.text, "b": b.text, "score": verdict.score}
        if verdict.rewards is not None:
            row["rewards"] = list(verdict.rewards)
        if verdict.positions is not None:
            row["positions"] = list(verdict.positions)
        answers.append(row)
    return {
        "a": comparison.names[0],
        "b": comparison.names[1],
        "data": comparison.data,
        "judge": comparison.judge,
        "wins": {"a": comparison.counts[0.0], "ties": comparison.counts[0.5], "b": comparison.counts[1.0]},
        "figures": figures,
        "remarks": comparison.remarks,
        "answers": answers,
    }


def _plain_figure(figure: Figure) -> dict[str, Any]:
    plain: dict[str, Any] = {"name": figure.name.removesuffix(", %"), "a": figure.a, "b": figure.b, "n": figure.count}
    if figure.estimate is not None:
        estimate = figure.estimate
        # NaN is no JSON.
        p_value = None if math.isnan(estimate.p_value) else estimate.p_value
        plain |= {"of": "b" if figure.estimates_b else "b - a", "value": estimate.value}
        plain |= {"low": estimate.low, "high": estimate.high, "p": p_value}
    return plain
