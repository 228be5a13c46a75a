"""``run.yaml``: the options that a run was given, and what it ran on."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from rlhf.runs.files import RECORD, RUN_FILE, read_run, write_whole

RUNNING, FINISHED = "running", "finished"
_HEADER = """\
# The options that this run was given: `rlhf {command} --config {file} --output_dir OTHER-FOLDER` runs it again.
# All options with their defaults are in run_options.json of each checkpoint.
"""
_HEADER_OF_PROGRAM = "# The options of this run that are not the defaults; a program started it.\n"


def write_record(folder: Path, options: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write ``run.yaml``, whole or not at all.

    Args:
        folder: of the run; made where it is missing.
        options: by name, of JSON types and without secrets.
        record: what the run ran on, alike.

    Raises:
        OSError: the file cannot be written.
    """
    command = record.get("command")
    header = _HEADER.format(command=command, file=folder / RUN_FILE) if command else _HEADER_OF_PROGRAM
    # Only in a file: the order is that of a reader's questions.
    text = yaml.safe_dump({**options, RECORD: dict(record)}, sort_keys=False, allow_unicode=True, width=120)
    write_whole(folder / RUN_FILE, header + text)


def continue_record(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run that goes on: it began when its first part began.

    Args:
        folder: of the run; it may have no record.
        record: of this part.

    Returns:
        The record, with the beginning of each later part under ``resumed``.
    """
    if not (folder / RUN_FILE).exists():
        return dict(record)
    earlier = read_run(folder).record
    resumed = [*earlier.get("resumed", []), record["started"]]
    return {**record, "started": earlier.get("started", record["started"]), "resumed": resumed}


def now() -> str:
    """The time as records have it: ISO 8601, UTC, in seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
