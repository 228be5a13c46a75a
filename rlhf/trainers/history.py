"""The log of a run as a table."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

_STEP = "step"
_TOTALS = "train_runtime"  # the last line of a run has totals instead of the figures of a step


def as_frame(lines: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The lines of a log as a table.

    Args:
        lines: as ``trainer.state.log_history`` or ``metrics.jsonl`` have them.

    Returns:
        A row for each step that was logged, indexed by ``step``. Figures of an evaluation are in columns that begin
        with ``eval_``, in the row of the step at which it was made; elsewhere they are NaN. The line of totals at the
        end of a run is left out. Without lines the table is empty.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        if _TOTALS not in line:
            rows.setdefault(line[_STEP], {}).update(line)
    frame = pd.DataFrame(list(rows.values()))
    if frame.empty:
        return pd.DataFrame(index=pd.Index([], name=_STEP, dtype="int64"))
    return frame.set_index(_STEP).sort_index()
