"""Which row a sequence of a batch came from. Slow, and meant for messages about a step that went wrong."""

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from torch import Tensor

from rlhf.data.batch import Batch, Row, sequences


def ids_of_sequences(batch: Batch) -> list[list[int]]:
    """Read the sequences out of a batch, each with its prompt.

    Args:
        batch: In either layout.

    Returns:
        The token ids of each sequence, without padding.
    """
    if batch.segments is None:
        masks = batch.attention_mask.bool()
        return [_ids(row[mask]) for row, mask in zip(batch.input_ids, masks, strict=True)]
    flat_ids = _ids(batch.input_ids.flatten())
    starts: list[int] = []
    found: list[list[int]] = []
    position = 0
    for span in batch.segments.spans:
        starts.append(position)
        shared = flat_ids[starts[span.parent] :][: span.prefix] if span.prefix else []
        found.append(shared + flat_ids[position : position + span.length])
        position += span.length
    return found


def find_row(rows: Dataset, ids: list[int]) -> int | None:
    """Find the first row that has a sequence as its first one; of rows that are prompts, the longest it begins with.

    Args:
        rows: Tokenised rows.
        ids: A sequence with its prompt.

    Returns:
        The index of the row; None if there is none.
    """
    lengths, are_prompts = _lengths_of_first_sequences(rows)
    if are_prompts:
        fitting = np.flatnonzero(lengths <= len(ids))
        fitting = fitting[np.argsort(-lengths[fitting], kind="stable")]
    else:
        fitting = np.flatnonzero(lengths == len(ids))
    for index in fitting.tolist():
        row_ids = _first_ids(rows[index], are_prompts)
        if row_ids == ids[: len(row_ids)]:
            return int(index)
    return None


def _ids(tokens: Tensor) -> list[int]:
    return tokens.tolist()


def _first_ids(row: Row, is_prompt: bool) -> list[int]:
    return row["prompt_ids"] if is_prompt else sequences(row)[0].ids


def _lengths_of_first_sequences(rows: Dataset) -> tuple[np.ndarray, bool]:
    """Tokens of the first sequence of each row, int64 [rows]; and whether rows are prompts without an answer."""
    arrow_table = rows.with_format("arrow")[:]
    has_completions = "labels" in arrow_table.column_names  # otherwise `completions` is a column of the user's
    names = ["input_ids", "prompt_ids", "chosen_ids", *(["completions"] if has_completions else [])]
    known_names = [name for name in names if name in arrow_table.column_names]
    lengths = np.zeros(len(rows), dtype=np.int64)
    for name in known_names:
        id_lists = arrow_table[name]
        if name == "completions":  # a list of one completion
            id_lists = pc.list_flatten(id_lists)
        lengths += pc.list_value_length(id_lists).to_numpy().astype(np.int64)
    return lengths, known_names == ["prompt_ids"]
