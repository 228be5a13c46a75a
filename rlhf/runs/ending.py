"""The four lines at the end of a run: what changed, what it cost, where it is, and what to do next."""

import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.runs.lines import EVALUATION, SEPARATOR, duration, evaluation_prefix, number, thousands

_MOST_FIGURES = 2  # of an evaluation, so that the line fits a terminal
Kind = Literal["model", "adapter", "reward model"]


@dataclass(frozen=True)
class Ending:
    """What the last lines of a run tell.

    Attributes:
        folder: of the run.
        kind: of what it holds.
        history: the entries of the trainer's log.
        figures: metrics that matter, with the names that a line gives them, in their order.
        steps: that were trained.
        seconds: of training.
        tokens: that were read in training.
    """

    folder: Path
    kind: Kind
    history: Sequence[Mapping[str, Any]]
    figures: Mapping[str, str]
    steps: int
    seconds: float
    tokens: int

    def lines(self, commands: Collection[str]) -> list[str]:
        """The lines.

        Args:
            commands: names of those that there are; others are not proposed.

        Returns:
            Four lines.
        """
        speed = f"{SEPARATOR}{thousands(self.tokens / self.seconds)} tok/s" if self.seconds > 0 else ""
        return [
            f"result  {before_and_after(self.history, self.figures)}",
            f"cost    {self.steps} steps in {duration(self.seconds)}{SEPARATOR}{thousands(self.tokens)} tokens{speed}",
            f"saved   {self.folder} ({folder_size(self.folder)})",
            f"next    {SEPARATOR.join(next_commands(self.folder, self.kind, commands))}",
        ]


def before_and_after(history: Sequence[Mapping[str, Any]], figures: Mapping[str, str]) -> str:
    """The figures at the first and at the last evaluation; of training where there was one evaluation, or none.

    Args:
        history: the entries of the trainer's log.
        figures: as :class:`Ending` has them.

    Returns:
        Such as ``evaluation: loss 4.655 → 4.159 (steps 10 and 30)``.
    """
    evaluations, prefix = _evaluations(history, figures)
    of_last = {entry["step"]: entry for entry in evaluations}  # the last one of each step
    if len(of_last) > 1:
        return f"evaluation: {_change(list(of_last.values()), figures, prefix)}"
    parts = []
    # Not all lines of a trainer have figures: a rollout may serve several.
    training = [entry for entry in history if "loss" in entry and _texts(entry, figures, "")]
    if training:
        parts.append(f"training: {_change(training, figures, '')}")
    if evaluations:
        texts = _texts(evaluations[-1], figures, prefix)
        parts.append(f"evaluation: {SEPARATOR.join(f'{name} {text}' for name, text in texts.items())}")
    return "; ".join(parts) or "no line of the log: see --logging_steps"


def _evaluations(
    history: Sequence[Mapping[str, Any]], figures: Mapping[str, str]
) -> tuple[list[Mapping[str, Any]], str]:
    """The evaluations of the first set of rows, and what the names of their metrics begin with."""
    for entry in history:
        prefix = "" if "loss" in entry else evaluation_prefix(entry, figures)
        if prefix.startswith(f"{EVALUATION}_"):
            metric = next(name for name in entry if name.startswith(prefix))
            return [other for other in history if metric in other], prefix
    return [], ""


def _change(entries: Sequence[Mapping[str, Any]], figures: Mapping[str, str], prefix: str) -> str:
    first, last = _texts(entries[0], figures, prefix), _texts(entries[-1], figures, prefix)
    parts = [f"{name} {first[name]} → {text}" if name in first else f"{name} {text}" for name, text in last.items()]
    where = f" (steps {entries[0]['step']} and {entries[-1]['step']})"
    if len(entries) == 1:
        parts, where = [f"{name} {text}" for name, text in last.items()], f" (step {entries[0]['step']})"
    return SEPARATOR.join(parts) + where


def _texts(entry: Mapping[str, Any], figures: Mapping[str, str], prefix: str) -> dict[str, str]:
    texts = {label: number(entry[prefix + name]) for name, label in figures.items() if prefix + name in entry}
    return dict(list(texts.items())[:_MOST_FIGURES])


def next_commands(folder: Path, kind: Kind, commands: Collection[str]) -> list[str]:
    """What can be done with the result of a run.

    Args:
        folder: of the run.
        kind: of what it holds.
        commands: names of those that there are.

    Returns:
        Two command lines at most, the most useful one first.
    """
    name = shlex.quote(str(folder))
    merged = shlex.quote(f"{folder}-merged")
    proposed = {
        "model": {"chat": name, "report": name},
        "adapter": {"chat": name, "merge": f"{name} -o {merged}", "report": name},
        "reward model": {"grpo": f"--reward_funcs {name} …", "report": name},
    }
    lines = [f"rlhf {command} {words}" for command, words in proposed[kind].items() if command in commands]
    return lines[:2]


def folder_size(folder: Path) -> str:
    """The bytes of all files of a folder, in the units of a disk.

    Args:
        folder: with all folders in it.

    Returns:
        Such as ``269 MB``.
    """
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place, name)
            total += 0 if file.is_symlink() or not file.exists() else file.stat().st_size
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if total >= size:
            return f"{total / size:.3g} {unit}"
    return f"{total / 1e3:.0f} kB"
