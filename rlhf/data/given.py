"""Rows as a Python program has them: a data set, a stream, a list of dictionaries, a DataFrame, or a path."""

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, IterableDataset

from rlhf.data.mixing import Mixture, load_datasets
from rlhf.data.tables import table_of_rows
from rlhf.data.text_files import Row

_EXPECTED = "a list of dictionaries, a pandas DataFrame, a path, a Dataset or an IterableDataset of `datasets`"
_PLAIN = (str, bool, int, float)


def as_rows(given: Any) -> Any:
    """Make a data set of what a caller has.

    A missing value (None, NaN, ``pandas.NA``) is missing, and never the text "nan".

    Args:
        given: a list of dictionaries; a ``pandas.DataFrame``, whose index is not read; a path, a name on the hub, or a
            list of them, as :func:`rlhf.data.load_datasets` takes them; or a ``Dataset``, an ``IterableDataset``, a
            :class:`Mixture` or None, which stay as they are.

    Returns:
        A ``Dataset``; a mixture of several paths; or what was given.

    Raises:
        ValueError: another type, or a value that is no text, number, list or dictionary.
        FileNotFoundError: there is no such file.
    """
    if given is None or isinstance(given, Dataset | IterableDataset | Mixture):
        return given
    if isinstance(given, str | PathLike):
        return load_datasets(str(given))
    if isinstance(given, pd.DataFrame):
        return _from_frame(given)
    if isinstance(given, list | tuple) and given:
        if all(isinstance(item, str | PathLike) for item in given):
            return load_datasets([str(item) for item in given])
        return table_of_rows(_plain_rows(given))
    if isinstance(given, list | tuple):
        raise ValueError("the list of rows is empty: give at least one row")
    raise ValueError(f"expected rows as {_EXPECTED}; got {type(given).__name__}")


def _from_frame(frame: pd.DataFrame) -> Dataset:
    if frame.empty:
        raise ValueError("the DataFrame has no rows: give at least one row")
    unnamed = [column for column in frame.columns if not isinstance(column, str)]
    if unnamed:
        raise ValueError(f"the DataFrame has a column {unnamed[0]!r}; name its columns, such as prompt and completion")
    return table_of_rows(_plain_rows(frame.to_dict("records")))


def _plain_rows(rows: Iterable[Any]) -> list[Row]:
    plain_rows = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {number}: expected a dictionary, got {type(row).__name__}")
        plain_rows.append({str(column): _plain(f"row {number}: {column!r}", value) for column, value in row.items()})
    return plain_rows


def _plain(place: str, value: Any) -> Any:
    """A value as JSON has it: None, text, a number, a list or a dictionary."""
    # NaN is the only number that differs from itself.
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value):
        return None
    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.ndarray | np.generic):
        return _plain(place, value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(place, item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(place, item) for key, item in value.items()}
    # Text of another class, such as numpy's.
    if isinstance(value, str):
        return str(value)
    raise ValueError(f"{place} holds a {type(value).__name__}; expected text, a number, a list or a dictionary")
