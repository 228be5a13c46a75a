"""Figures and answers of several models side by side, on a terminal."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from rlhf.data.messages import Turns
from rlhf.visible import visible


def show_metrics(columns: Mapping[str, Mapping[str, float]]) -> None:
    """Print a row for each metric and a column for each model.

    Args:
        columns: From the name of a model to its metrics.
    """
    # Not every model has every metric: a teacher has no figure that compares it with itself.
    metric_names = dict.fromkeys(metric_name for metrics in columns.values() for metric_name in metrics)
    metric_table = Table("", *map(visible, columns))
    for metric_name in metric_names:
        cells = [_format(metrics[metric_name]) if metric_name in metrics else "–" for metrics in columns.values()]
        metric_table.add_row(metric_name, *cells)
    # Columns are called by the names of folders: words in square brackets are no styles.
    Console().print(metric_table, markup=False)


def _format(value: float) -> str:
    # Four digits of 12340 would be printed as 1.234e+04.
    is_large = 1e4 <= value < 1e9
    return f"{value:.0f}" if is_large else f"{value:.4g}"


def show_completions(prompts: Sequence[Turns], columns: Mapping[str, Sequence[str]]) -> None:
    """Print a row for each prompt and a column for each model.

    Args:
        prompts: Text or messages.
        columns: From the name of a model to its answers, one for each prompt.
    """
    if not prompts:
        return
    answer_table = Table("prompt", *map(visible, columns), show_lines=True)
    for prompt_index, prompt in enumerate(prompts):
        answers = [completions[prompt_index].strip() for completions in columns.values()]
        answer_table.add_row(*map(visible, (prompt_text(prompt).strip(), *answers)))
    # Answers are text of a model: words in square brackets are no styles.
    Console().print(answer_table, markup=False)


def prompt_text(prompt: Turns) -> str:
    """The text of a prompt; in a conversation of several messages, each begins with its role.

    Args:
        prompt: Text or messages.

    Returns:
        Text.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content"))
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)
