"""Benchmarks of lm-eval, EleutherAI's harness, on a model in memory."""

import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

_YAML = (".yaml", ".yml")
_NAME = re.compile(r"^(?:task|group):[ \t]*['\"]?([^\s'\"#]+)", re.MULTILINE)


def check_tasks(tasks: Sequence[str]) -> None:
    """Find out before a model is loaded what would fail after it.

    Args:
        tasks: Names of tasks, or YAML files.

    Raises:
        ImportError: lm-eval is not installed.
        FileNotFoundError: There is no such YAML file.
        ValueError: There is no such task.
    """
    if find_spec("lm_eval") is None:
        raise ImportError("--tasks needs lm-eval: pip install 'rlhf-exact[eval]'")
    for task in tasks:
        if Path(task).suffix in _YAML and not Path(task).is_file():
            raise FileNotFoundError(f"--tasks {task}: no such file")
    known_names = set(_task_manager(_folders(tasks)).all_tasks)
    for task in _task_names(tasks):
        if task not in known_names:
            raise ValueError(f"--tasks {task}: no such task of lm-eval; `lm_eval ls tasks` lists them")


def task_metrics(
    model: Any, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], batch_size: int
) -> dict[str, float]:
    """Run tasks with the settings that they come with.

    Args:
        model: A causal LM in memory.
        tokenizer: The tokenizer of the model.
        tasks: Names of tasks, or YAML files of single tasks.
        batch_size: Sequences in one forward pass.

    Returns:
        ``TASK/METRIC``, and ``TASK/METRIC_stderr`` where lm-eval gives a standard error.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _task_manager(_folders(tasks))
    harness_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = simple_evaluate(harness_model, tasks=_task_names(tasks), task_manager=manager, log_samples=False)
    return {
        f"{task}/{_metric_name(key)}": float(value)
        for task, metrics in results["results"].items()
        for key, value in metrics.items()
        if isinstance(value, int | float) and "," in key
    }


def _metric_name(key: str) -> str:
    """``acc,none`` is ``acc``; another filter stays in the name."""
    metric, _, filter_name = key.partition(",")
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _task_names(tasks: Sequence[str]) -> list[str]:
    """Names as lm-eval knows them; a file of a task has its name in it."""
    return [_name_in(Path(task)) if Path(task).suffix in _YAML else task for task in tasks]


def _name_in(file: Path) -> str:
    # Not read as YAML: the tag !function in such files names code that lm-eval runs.
    match = _NAME.search(file.read_text(encoding="utf-8"))
    if match is None:
        raise ValueError(f"--tasks {file}: no line `task: NAME`, as tasks of lm-eval have it")
    return match[1]


@cache
def _task_manager(folders: tuple[str, ...]) -> Any:
    """lm-eval's index of tasks; making it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders) or None)


def _folders(tasks: Sequence[str]) -> tuple[str, ...]:
    """Of tasks in files."""
    return tuple(sorted({str(Path(task).absolute().parent) for task in tasks if Path(task).suffix in _YAML}))
