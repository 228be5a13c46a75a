"""The health of a run, in words: what is wrong, and what was checked."""

from dataclasses import dataclass

from rlhf.runs.figures import Figures
from rlhf.runs.files import Run
from rlhf.runs.findings import Finding
from rlhf.runs.preference_checks import PREFERENCE_CHECKS
from rlhf.runs.rollout_checks import ROLLOUT_CHECKS
from rlhf.runs.sample_checks import SAMPLE_CHECKS
from rlhf.runs.training_checks import TRAINING_CHECKS

CHECKS = (*TRAINING_CHECKS, *PREFERENCE_CHECKS, *ROLLOUT_CHECKS, *SAMPLE_CHECKS)
_ORDER = ("problem", "warning", "hint")


@dataclass(frozen=True)
class Health:
    """What the checks of a run found.

    Attributes:
        findings: the worst first.
        passed: titles of the checks that found nothing.
    """

    findings: list[Finding]
    passed: list[str]


def examine(run: Run) -> Health:
    """Check the health of a run; docs/report.md lists the checks with their limits.

    Args:
        run: as its folder describes it.

    Returns:
        What was found. Checks that need figures which the run does not have are left out.
    """
    return examine_figures(Figures(run))


def examine_figures(figures: Figures) -> Health:
    """Check the health of a run whose figures were read already.

    Args:
        figures: of the run.

    Returns:
        As :func:`examine`.
    """
    findings: list[Finding] = []
    passed = []
    for check in CHECKS:
        found = check.find(figures)
        if found:
            findings += found
        elif found is not None:
            passed.append(check.title)
    return Health(sorted(findings, key=lambda finding: _ORDER.index(finding.level)), passed)
