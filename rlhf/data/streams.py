"""Rows that may be a stream: an ``IterableDataset``, which is read while training and never held as a whole."""

import re
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

SAMPLE_SIZE = 100  # rows that are looked at before training


def name_of(rows: Dataset | IterableDataset) -> str:
    """The name of a data set for messages: the file it came from, where that is known."""
    return rows.info.dataset_name or "data set"


def source_of(rows: Dataset | IterableDataset) -> str:
    """The file, folder, pattern or hub name that a data set was read from; its name without the slice."""
    # As `load_data` names a slice: "file (train[:100])".
    return re.sub(r" \(\w+\[.*\]\)$", "", name_of(rows))


def columns_of(rows: Dataset | IterableDataset) -> list[str]:
    """The columns of a data set; of a stream that does not know them, those of its first rows."""
    if isinstance(rows, Dataset) or rows.column_names is not None:
        return list(rows.column_names or [])
    # Rows from a generator have no schema, and each may have other keys.
    first_rows = rows.take(SAMPLE_SIZE)
    return list(dict.fromkeys(column for row in first_rows for column in row))


def sample(rows: Any) -> Any:
    """Rows to look at before training.

    Args:
        rows: A ``Dataset`` or an ``IterableDataset``.

    Returns:
        All rows of a data set; the first ones of a stream, as a ``Dataset``.
    """
    return Dataset.from_list(list(rows.take(SAMPLE_SIZE))) if isinstance(rows, IterableDataset) else rows


def in_memory(rows: Any) -> Any:
    """Hold the rows of a stream in memory. Evaluation reads its rows again and again.

    Args:
        rows: A ``Dataset`` or an ``IterableDataset``.

    Returns:
        A ``Dataset``.
    """
    return Dataset.from_list(list(rows)) if isinstance(rows, IterableDataset) else rows


class Endless(TorchIterableDataset[dict[str, Any]]):
    """A stream that begins again at its end, in another order if it is shuffled.

    It is a type of its own because of accelerate: of a stream of ``datasets`` each process would read a shard, and so
    other rows than one process reads. Of any other stream each process takes its rows of each batch.

    Args:
        rows: The stream.
    """

    def __init__(self, rows: IterableDataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = 0
        has_rows = True
        while has_rows:  # an empty stream ends, instead of turning without end
            has_rows = False
            self.rows.set_epoch(epoch)  # seeds the order of this pass
            for row in self.rows:
                has_rows = True
                yield row
            epoch += 1
