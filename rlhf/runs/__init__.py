"""The files that describe a run: its record, its metrics, its model card and its report."""

from rlhf.runs.files import Run, read_run

__all__ = ["Run", "read_run"]
