"""Several short examples in one row: which go together is decided once, before training. Sizes of tokenised rows."""

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
    """Put items into few bins: the longest first, each into the fullest bin that still has space.

    Args:
        lengths: Size of each item.
        capacity: Of a bin. A larger item gets a bin of its own.

    Returns:
        Indices of the items in each bin; at most 11/9 of the least possible number of bins, plus four.

    Source: Johnson et al. 1974; for language models arXiv 2404.10830.
    """
    packed_bins: list[list[int]] = []
    free_spaces: list[tuple[int, int]] = []  # (free space, index of the bin), in order
    # Items of one length keep their order, so that the bins are the same on each machine.
    for item_index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        item_length = lengths[item_index]
        # −1 is less than any index: a bin with exactly this space is found too.
        position = bisect_left(free_spaces, (item_length, -1))
        if position < len(free_spaces):
            free_space, bin_index = free_spaces.pop(position)
            packed_bins[bin_index].append(item_index)
        else:
            free_space, bin_index = capacity, len(packed_bins)
            packed_bins.append([item_index])
        # Full bins, and those of too long an item, leave the list: each search stays short.
        if free_space > item_length:
            insort(free_spaces, (free_space - item_length, bin_index))
    return packed_bins


def num_tokens(rows: Dataset) -> np.ndarray:
    """Count the tokens of each row when its prompt is computed once.

    Args:
        rows: Tokenised rows.

    Returns:
        int64 [rows].
    """
    # A row has some of these columns; their lengths add up.
    lengths = _lengths_of_columns(rows, ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids", "completions"))
    return sum(lengths.values())  # type: ignore[return-value]


def longest_sequences(rows: Dataset) -> np.ndarray:
    """Count the tokens of the longest sequence of each row: a prompt with one of its answers.

    Args:
        rows: Tokenised rows.

    Returns:
        int64 [rows].
    """
    lengths = _lengths_of_columns(rows, ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids"))
    if "input_ids" in lengths:
        return lengths["input_ids"]
    if "labels" in rows.column_names:  # otherwise `completions` is a column of the user's, beside a prompt
        lengths |= _lengths_of_columns(rows, ("completions",))
    prompt_lengths = lengths.pop("prompt_ids")
    return prompt_lengths + (np.maximum.reduce(list(lengths.values())) if lengths else 0)


def _lengths_of_columns(rows: Dataset, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Tokens of each row in those of the columns that are there, int64 [rows] each."""
    arrow_table = rows.with_format("arrow")[:]
    lengths = {}
    for column_name in names:
        if column_name not in arrow_table.column_names:
            continue
        id_lists = arrow_table[column_name]
        if column_name == "completions":  # a list of one completion
            id_lists = pc.list_flatten(id_lists)
        # Arrow counts in int32 or int64, by the type of the list; sums need one type.
        lengths[column_name] = pc.list_value_length(id_lists).to_numpy().astype(np.int64)
    return lengths


def largest_token(rows: Dataset) -> int:
    """Find the largest id in tokenised rows.

    Args:
        rows: Tokenised rows.

    Returns:
        The id; -1 if there is none.
    """
    arrow_table = rows.with_format("arrow")[:]
    largest = -1
    for column_name in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids", "completions", "mismatched"):
        if column_name not in arrow_table.column_names:
            continue
        token_ids = arrow_table[column_name]
        while pa.types.is_nested(token_ids.type):
            token_ids = pc.list_flatten(token_ids)
        if len(token_ids):
            # The maximum of nulls is None.
            largest = max(largest, pc.max(token_ids).as_py() or -1)
    return largest


def hash_of_tokens(rows: Dataset, columns: Sequence[str]) -> str:
    """Hash lists of ids, row by row. The result does not depend on how the rows lie in memory.

    Args:
        rows: Tokenised rows.
        columns: Names of columns that hold lists of ids, nested or not.

    Returns:
        64 bits in hexadecimal digits.
    """
    digest = xxhash.xxh3_64()
    arrow_table = rows.with_format("arrow")[:]
    for column_name in columns:
        id_chunks = arrow_table[column_name].chunks
        while id_chunks and pa.types.is_list(id_chunks[0].type):
            # The lengths tell [[1], [2]] from [[1, 2]].
            for id_chunk in id_chunks:
                digest.update(np.ascontiguousarray(pc.list_value_length(id_chunk).to_numpy()).data)
            # `flatten` respects the offset of a slice; `values` would return the whole buffer behind it.
            id_chunks = [id_chunk.flatten() for id_chunk in id_chunks]
        for id_chunk in id_chunks:
            # Lists that are all empty have no type of their items, and nothing to hash.
            if not pa.types.is_null(id_chunk.type):
                digest.update(np.ascontiguousarray(id_chunk.to_numpy()).data)
    return digest.hexdigest()


class Packed(TorchDataset[dict[str, Any]]):
    """Tokenised rows, several to an item: ``{"examples": [row, ...]}``.

    The bins stay the same in each epoch; their order is the sampler's.

    Args:
        rows: Tokenised rows.
        capacity: Tokens of an item. A longer row is an item by itself.
    """

    def __init__(self, rows: Dataset, capacity: int) -> None:
        row_lengths = num_tokens(rows).tolist()
        self.rows = rows
        self.bins = best_fit_decreasing(row_lengths, capacity)
        num_bins = len(self.bins)
        total_tokens = sum(row_lengths)
        logger.info(
            "packed %d rows into %d of at most %d tokens: %.1f rows and %.0f tokens each, %.1f %% full",
            len(rows),
            num_bins,
            capacity,
            len(rows) / num_bins,
            total_tokens / num_bins,
            100 * total_tokens / num_bins / capacity,
        )
        if too_long := [row_length for row_length in row_lengths if row_length > capacity]:
            logger.warning(
                "%d of %d rows are longer than the %d tokens of a batch (up to %d): each is a batch by itself",
                len(too_long),
                len(rows),
                capacity,
                max(too_long),
            )

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        columns = self.rows[self.bins[index]]
        examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return {"examples": examples}
