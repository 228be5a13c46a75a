"""Rows of many short examples: which go together is planned once, before training."""

import logging
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

logger = logging.getLogger(__name__)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into few bins: the longest first, each into the fullest bin that still has room.

    Args:
        lengths: size of each item. capacity: of a bin; an item that is larger gets a bin of its own.
    Returns:
        Indices of the items in each bin; at most 11/9 of the least possible number of bins, plus four.

    Source: Johnson et al. 1974; for language models arXiv 2404.10830.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin) in order of room
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, index = rooms.pop(place)
            bins[index].append(item)
        else:
            room, index = capacity, len(bins)
            bins.append([item])
        if room > length:
            insort(rooms, (room - length, index))
    return bins


def num_tokens(rows: Dataset) -> np.ndarray:
    """Tokens of each row when its prompt is computed once; int64 [rows]."""
    table = rows.with_format("arrow")[:]
    names = [name for name in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids") if name in table.column_names]
    columns = [table[name] for name in names]
    if "completions" in table.column_names:  # one in each row
        columns.append(pc.list_flatten(table["completions"]))
    return sum(pc.list_value_length(column).to_numpy().astype(np.int64) for column in columns)


def longest_sequences(rows: Dataset) -> np.ndarray:
    """Tokens of the longest sequence of each row, a prompt with one of its answers; int64 [rows]."""
    table = rows.with_format("arrow")[:]
    own = {name: _lengths(table[name]) for name in ("input_ids", "prompt_ids") if name in table.column_names}
    answers = [_lengths(table[name]) for name in ("chosen_ids", "rejected_ids") if name in table.column_names]
    if "completions" in table.column_names and "labels" in table.column_names:
        answers.append(_lengths(pc.list_flatten(table["completions"])))  # one in each row
    longest = np.maximum.reduce(answers) if answers else 0
    return own["input_ids"] if "input_ids" in own else own["prompt_ids"] + longest


def _lengths(column: Any) -> np.ndarray:
    return pc.list_value_length(column).to_numpy().astype(np.int64)


def largest_token(rows: Dataset) -> int:
    """The largest id in tokenised rows, nested or not; -1 where there is none."""
    table = rows.with_format("arrow")[:]
    largest = -1
    for name in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids", "completions", "mismatched"):
        column = table[name] if name in table.column_names else None
        while column is not None and pa.types.is_nested(column.type):
            column = pc.list_flatten(column)
        if column is not None and len(column):
            largest = max(largest, pc.max(column).as_py() or -1)
    return largest


def hash_of_tokens(rows: Dataset, columns: Sequence[str]) -> str:
    """Of the lists of ids in ``columns``, nested or not, row by row; however the rows lie in memory."""
    digest = xxhash.xxh3_64()
    table = rows.with_format("arrow")[:]
    for column in columns:
        parts = table[column].chunks
        while parts and pa.types.is_list(parts[0].type):
            for part in parts:
                digest.update(np.ascontiguousarray(pc.list_value_length(part).to_numpy()).data)
            parts = [part.flatten() for part in parts]
        for part in parts:
            digest.update(np.ascontiguousarray(part.to_numpy()).data)
    return digest.hexdigest()


class Packed(TorchDataset[dict[str, Any]]):
    """Tokenised rows, several to an item: ``{"examples": [row, ...]}``, at most ``capacity`` tokens.

    The bins stay the same in each epoch; their order is the sampler's.
    """

    def __init__(self, rows: Dataset, capacity: int) -> None:
        lengths = num_tokens(rows).tolist()
        self.rows = rows
        self.bins = best_fit_decreasing(lengths, capacity)
        logger.info(
            "packed %d rows into %d of at most %d tokens: %.1f rows and %.0f tokens each, %.1f %% full",
            len(rows), len(self.bins), capacity, len(rows) / len(self.bins), sum(lengths) / len(self.bins),
            100 * sum(lengths) / len(self.bins) / capacity,
        )  # fmt: skip
        if longest := [length for length in lengths if length > capacity]:
            logger.warning(
                "%d of %d rows are longer than the %d tokens of a batch (up to %d): each is a batch by itself",
                len(longest), len(rows), capacity, max(longest),
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        columns = self.rows[self.bins[index]]
        return {"examples": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]}
