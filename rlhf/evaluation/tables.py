"""Figures and answers side by side, for people."""

from rich.console import Console
from rich.table import Table

from rlhf.data.formats import Turns


def show_metrics(columns: dict[str, dict[str, float]]) -> None:
    """One row a metric, one column a model."""
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    table = Table("", *columns)
    for name in names:
        table.add_row(name, *(_figure(metrics[name]) if name in metrics else "–" for metrics in columns.values()))
    Console().print(table)


def _figure(value: float) -> str:
    return f"{value:.0f}" if 1e4 <= value < 1e9 else f"{value:.4g}"


def show_completions(prompts: list[Turns], columns: dict[str, list[str]]) -> None:
    """One row a prompt, one column a model."""
    if not prompts:
        return
    table = Table("prompt", *columns, show_lines=True)
    for index, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else "\n".join(str(turn.get("content")) for turn in prompt)
        table.add_row(text.strip(), *(answers[index].strip() for answers in columns.values()))
    Console().print(table, markup=False)
