"""A finding on the health of a run, and how findings are made."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rlhf.runs.figures import Figures

Level = Literal["problem", "warning", "hint"]


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        level: ``problem``: the run is of little use; ``warning``: look at it; ``hint``: good to know.
        text: what is wrong, in one sentence.
        evidence: the figures that show it.
        advice: what to do.
    """

    level: Level
    text: str
    evidence: str
    advice: str


# None where a run has not the figures that the check needs.
FindingOrNot: TypeAlias = list[Finding] | None


@dataclass(frozen=True)
class Check:
    """A check of a run's health.

    Attributes:
        title: what is true of a healthy run.
        find: takes the figures of a run; returns what is wrong, and None where there is nothing to look at.
    """

    title: str
    find: Callable[[Figures], FindingOrNot]


def number(value: float) -> str:
    """A figure for a sentence.

    Args:
        value: of a metric.

    Returns:
        Three significant digits.
    """
    return f"{value:.3g}"
