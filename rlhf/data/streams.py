"""Rows that are read while training goes on, and that nobody keeps."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

logger = logging.getLogger(__name__)

Row = dict[str, Any]
_SAMPLE = 100  # rows that are looked at before training


def columns_of(rows: Dataset | IterableDataset) -> list[str]:
    """Columns; of a stream that does not say, those of its first rows."""
    if isinstance(rows, Dataset) or rows.column_names is not None:
        return list(rows.column_names or [])
    return list(dict.fromkeys(key for row in rows.take(_SAMPLE) for key in row))


def tokenised_stream(
    rows: IterableDataset, process: Callable[[Row, int], list[Row]], report: Iterable[str]
) -> IterableDataset:
    """Rows by ``process``, one by one; those that say why they are dropped are left out, and counted.

    Raises:
        ValueError: no row is left among the first hundred.
    """
    name = rows.info.dataset_name or "data set"
    first = next((done for index, row in enumerate(rows.take(_SAMPLE)) for done in process(row, index)), None)
    if first is None:
        raise ValueError(f"{name}: no rows")
    columns = [column for column in first if column not in set(report)]
    told = _Told(name)

    def each(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        row = {column: values[0] for column, values in batch.items()}
        done = [one for one in process(row, indices[0]) if told.keeps(one, indices[0])]
        return {column: [one[column] for one in done] for column in columns}

    mapped = rows.map(each, with_indices=True, batched=True, batch_size=1, remove_columns=columns_of(rows))
    mapped = mapped.select_columns(columns)  # a key that came late
    mapped.info.dataset_name = name
    if not list(mapped.take(1)):
        raise ValueError(f"{name}: no row is left to train on; check the columns and max_length")
    return mapped


class _Told:
    """Tells what is dropped and cut: the first row of a kind, then at 10, 100, … of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.counts: dict[str, int] = {}

    def keeps(self, row: Row, index: int) -> bool:
        why = row.get("_bad") or row["_drop"]
        what = f"dropped rows {why}" if why else ("cut rows to max_length" if row["_cut"] else "")
        if what:
            count = self.counts[what] = self.counts.get(what, 0) + 1
            if str(count).strip("0") == "1":
                logger.warning("%s, row %d: %s (%d so far)", self.name, index + 1, what, count)
        return not row["_drop"]


class Endless(TorchIterableDataset[Row]):
    """A stream that begins again at its end, in another order where it is shuffled.

    A type of its own: accelerate gives processes shards of a stream of ``datasets``, and so other rows than one process
    reads; of any other, each process takes its rows of each batch.
    """

    def __init__(self, rows: IterableDataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        epoch, seen = 0, -1
        while seen:
            self.rows.set_epoch(epoch)
            epoch, seen = epoch + 1, 0
            for seen, row in enumerate(self.rows, start=1):  # noqa: B007  # counted
                yield row


def sample(rows: Any) -> Any:
    """Rows to look at before training: all of a data set, the first ones of a stream."""
    return Dataset.from_list(list(rows.take(_SAMPLE))) if isinstance(rows, IterableDataset) else rows


def held(rows: Any) -> Any:
    """Rows to evaluate on, which are read again and again: a stream's are kept."""
    return Dataset.from_list(list(rows)) if isinstance(rows, IterableDataset) else rows
