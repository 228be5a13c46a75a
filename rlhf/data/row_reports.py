"""What is reported of tokenised rows: rows left out, tokens cut off, answers not scored, columns not read."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.data.tokenised_rows import UNREADABLE, TokenisedRow

logger = logging.getLogger(__name__)


def report_unread_columns(name: str, columns: Sequence[str], read: Sequence[str]) -> None:
    """Log the columns that are not read.

    Args:
        name: The data set.
        columns: All of its columns, after renaming.
        read: Those that are read.
    """
    if unread_columns := [column for column in columns if column not in read]:
        logger.info("%s: columns not read: %s", name, ", ".join(unread_columns))


def report_rows(name: str, report: dict[str, list[Any]], max_length: int) -> None:
    """Log what was dropped, cut off and not scored, and what templates leave out.

    Args:
        name: The data set.
        report: The columns of :meth:`TokenisedRow.report`.
        max_length: The limit, for the message.
    """
    reasons, truncated = report["_drop"], report["_cut"]
    # Rows that cannot be read have a line of their own, with the file that lists them.
    for reason in sorted(set(reasons) - {"", UNREADABLE}):
        logger.warning("%s: dropped %d of %d rows %s", name, reasons.count(reason), len(reasons), reason)
    if any(truncated):
        rows_cut = sum(num_cut > 0 for num_cut in truncated)
        log_format = "%s: %d of %d rows cut to max_length %d, losing %d tokens in all"
        logger.warning(log_format, name, rows_cut, len(truncated), max_length, sum(truncated))
    # Fewer answers are scored if the user masks some, or if the template leaves some out.
    num_answers, num_scored = sum(report["_answers"]), sum(report["_scored"])
    if num_scored < num_answers:
        logger.warning("%s: %d of %d answers are scored", name, num_scored, num_answers)

    # One line for each note, with its first row: the rest is mostly the same.
    rows_of_note: dict[str, list[int]] = {}
    for index, notes in zip(report["_row"], report["_notes"], strict=True):
        for note in notes:
            rows_of_note.setdefault(note, []).append(index + 1)
    for note, row_numbers in rows_of_note.items():
        logger.warning("%s, row %d: %s (%d of %d rows)", name, row_numbers[0], note, len(row_numbers), len(reasons))


def list_bad_rows(name: str, report: dict[str, list[Any]], rows: int, file: str | None) -> None:
    """Write the rows that cannot be read into a file, and log how many there are.

    Args:
        name: The data set.
        report: The columns of :meth:`TokenisedRow.report`.
        rows: How many rows the data set has.
        file: Its lines are kept: other data sets may have written them. None writes nothing.

    Raises:
        ValueError: No row can be read.
    """
    bad_rows = [(index + 1, error) for index, error in zip(report["_row"], report["_bad"], strict=True) if error]
    if not bad_rows or file is None:
        return
    report_path = Path(file)
    report_path.parent.mkdir(parents=True, exist_ok=True)
    # Another data set, or a run before, may have written the file; a row that is in it is not added again.
    known_lines = report_path.read_text(encoding="utf-8").splitlines() if report_path.exists() else []
    new_lines = [json.dumps({"file": name, "row": row, "error": error}, ensure_ascii=False) for row, error in bad_rows]
    all_lines = dict.fromkeys([*known_lines, *new_lines])  # each once, in order
    # Written even if the run stops below: the user needs the list to mend the rows.
    report_path.write_text("\n".join(all_lines) + "\n", encoding="utf-8")

    first_row, first_error = bad_rows[0]
    log_format = "%s: left out %d of %d rows that cannot be read, listed in %s; first, row %d: %s"
    logger.warning(log_format, name, len(bad_rows), rows, report_path, first_row, first_error)
    if len(bad_rows) == rows:
        raise ValueError(f"{name}: none of {rows} rows can be read; row {first_row}: {first_error}")


class StreamReport:
    """Logs the rows of a stream that are dropped or cut: the first of each kind, then the 10th, the 100th, ...

    Args:
        name: The stream.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: Counter[str] = Counter()

    def add(self, row: TokenisedRow, index: int) -> None:
        """Count one row, and log it if its turn has come.

        Args:
            row: A tokenised row.
            index: Its place in the stream, from 0.
        """
        reason = row.error or row.dropped
        if reason:
            event_name = f"dropped rows {reason}"
        elif row.truncated:
            event_name = "cut rows to max_length"
        else:
            return
        self.counts[event_name] += 1
        event_count = self.counts[event_name]
        # A stream has no end at which rows could be summed up, and a line for each would flood the log.
        is_power_of_ten = str(event_count).strip("0") == "1"
        if is_power_of_ten:
            logger.warning("%s, row %d: %s (%d so far)", self.name, index + 1, event_name, event_count)
