"""The files that describe a run: its record, its metrics, its model card and its report."""

from rlhf.runs.files import Run, read_run
from rlhf.runs.findings import Finding
from rlhf.runs.health import Health, examine
from rlhf.runs.report import write_report

__all__ = ["Run", "read_run", "Finding", "Health", "examine", "write_report"]
