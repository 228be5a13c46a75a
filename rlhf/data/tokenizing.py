"""All rows of a data set to token ids: checked, truncated and counted, with a progress bar and a cache."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from rlhf.data.batch import IGNORE
from rlhf.data.columns import renamed
from rlhf.data.encoding import PairEncoder, PromptEncoder, Reading, RowEncoder, SftEncoder, UnpairedEncoder
from rlhf.data.errors import error_context
from rlhf.data.formats import has_labels
from rlhf.data.pairing import pairs_of_labelled
from rlhf.data.row_reports import StreamReport, list_bad_rows, report_rows, report_unread_columns
from rlhf.data.streams import SAMPLE_SIZE, columns_of, name_of
from rlhf.data.tokenised_rows import (
    REPORT_COLUMNS,
    UNREADABLE,
    Limits,
    TokenisedRow,
    check_prompt,
    row_limits,
    truncate,
)
from rlhf.data.vocabulary import tokenizer_rules
from rlhf.data.worker_processes import workers_end_with_this_process
from rlhf.visible import visible

logger = logging.getLogger(__name__)

TOKENISER_VERSION = 4  # part of the cache key: raise it when the meaning of a tokenised row changes

# From a row of a file and its index to the rows that it becomes.
Process = Callable[[dict[str, Any], int], list[TokenisedRow]]


def tokenize_sft(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    vocab_size: int,
    text_field: str = "text",
    drop_long_prompts: bool = False,
    num_proc: int | None = None,
    reading: Reading | None = None,
) -> Dataset:
    """Tokenise rows for supervised fine-tuning.

    A row without a scored token is dropped. What is dropped or cut off is logged.

    Args:
        dataset: Rows in any of the known columns.
        tokenizer: Has a chat template, unless all rows are text.
        max_length: Tokens of a row; the end of a longer one is cut off. None for no limit.
        vocab_size: Rows of the model's embeddings.
        text_field: The column of plain text.
        drop_long_prompts: Whether to leave out rows whose prompt alone reaches ``max_length``, instead of stopping.
        num_proc: Number of processes.
        reading: How rows are read.

    Returns:
        Rows of ``input_ids`` and ``labels``, which are −100 where nothing is learned.

    Raises:
        ValueError: A row is malformed or too long; names the data set, the row and the remedy.
    """
    reading = (reading or Reading()).for_tokenizer(tokenizer, text_field, dataset)
    dataset_name = name_of(dataset)
    with error_context(dataset_name):
        encoder = SftEncoder.for_columns(renamed(columns_of(dataset), reading.form), reading)
    if "rejected" in encoder.read:
        logger.info("%s: preference rows; their chosen answers are scored", dataset_name)
    elif "label" in encoder.read and has_labels(dataset, reading.form):
        logger.info("%s: rows with a 'label'; answers with label true are learned, the others left out", dataset_name)
    limits = row_limits(max_length, vocab_size, drop_long_prompts)
    return _tokenize(dataset, tokenizer, encoder, limits, num_proc)


def tokenize_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    vocab_size: int,
    drop_long_prompts: bool = False,
    num_proc: int | None = None,
    margin: bool = False,
    reading: Reading | None = None,
) -> Dataset:
    """Tokenise pairs of a chosen and a rejected answer. Long answers are cut off at the end, the prompt never.

    Args:
        dataset: Pairs; or rows of ``completion`` and ``label``, which are paired if a prompt has good and bad answers.
        tokenizer: As in :func:`tokenize_sft`.
        max_length: Tokens of a prompt with one answer. None for no limit.
        vocab_size: Rows of the model's embeddings.
        drop_long_prompts: Whether to leave out rows whose prompt alone reaches ``max_length``, instead of stopping.
        num_proc: Number of processes.
        margin: Whether to keep the column ``margin``, if there is one.
        reading: How rows are read.

    Returns:
        Rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``; with ``labels``, for each of both answers, if some
        of their tokens are not scored.

    Raises:
        ValueError: A row is malformed or too long; names the data set, the row and the remedy.
    """
    reading = (reading or Reading()).for_tokenizer(tokenizer, rows=dataset)
    with error_context(name_of(dataset)):
        column_names = renamed(columns_of(dataset), reading.form)
        # The answers to a prompt may stand far apart, so a stream cannot be paired.
        if "label" in column_names and "chosen" not in column_names and isinstance(dataset, Dataset):
            dataset = pairs_of_labelled(dataset, reading.form)
            column_names = columns_of(dataset)
            reading = replace(reading, form=replace(reading.form, columns={}))
        encoder = PairEncoder.for_columns(column_names, reading, margin)
    limits = row_limits(max_length, vocab_size, drop_long_prompts)
    return _without_plain_labels(_tokenize(dataset, tokenizer, encoder, limits, num_proc))


def tokenize_unpaired(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    vocab_size: int,
    drop_long_prompts: bool = False,
    num_proc: int | None = None,
    reading: Reading | None = None,
) -> Dataset:
    """Tokenise answers that are good or bad by themselves. A pair becomes two rows.

    Args:
        dataset: Rows of a prompt, a completion and a ``label``; or pairs.
        tokenizer: As in :func:`tokenize_sft`.
        max_length: Tokens of a prompt with its answer. None for no limit.
        vocab_size: Rows of the model's embeddings.
        drop_long_prompts: Whether to leave out rows whose prompt alone reaches ``max_length``, instead of stopping.
        num_proc: Number of processes.
        reading: How rows are read.

    Returns:
        Rows of ``prompt_ids``, ``completions`` (one), ``labels`` (of its tokens) and ``desirable``.

    Raises:
        ValueError: A row is malformed or too long; names the data set, the row and the remedy.
    """
    reading = (reading or Reading()).for_tokenizer(tokenizer, rows=dataset)
    with error_context(name_of(dataset)):
        encoder = UnpairedEncoder.for_columns(renamed(columns_of(dataset), reading.form), reading)
    limits = row_limits(max_length, vocab_size, drop_long_prompts)
    return _tokenize(dataset, tokenizer, encoder, limits, num_proc)


def tokenize_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    vocab_size: int,
    drop_long_prompts: bool = False,
    num_proc: int | None = None,
    reading: Reading | None = None,
) -> Dataset:
    """Tokenise prompts for on-policy training.

    Args:
        dataset: Rows with a prompt. No stream: the number of prompts must be known.
        tokenizer: As in :func:`tokenize_sft`.
        max_prompt_length: Tokens of a prompt.
        vocab_size: Rows of the model's embeddings.
        drop_long_prompts: Whether to leave out rows with a longer prompt, instead of stopping.
        num_proc: Number of processes.
        reading: How rows are read.

    Returns:
        The rows with all of their columns, for reward functions, and with ``prompt_ids``.

    Raises:
        ValueError: A row is malformed or too long; names the data set, the row and the remedy.
    """
    reading = (reading or Reading()).for_tokenizer(tokenizer, rows=dataset)
    dataset_name = name_of(dataset)
    # The number of steps of an epoch depends on the number of prompts.
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{dataset_name}: prompts to answer are counted before training: leave out --streaming")
    with error_context(dataset_name):
        encoder = PromptEncoder.for_columns(renamed(dataset.column_names, reading.form), reading)
    limits = Limits(max_prompt_length, vocab_size, drop_long_prompts)
    process = _RowProcess(tokenizer, encoder, dataset_name, limits, fit=check_prompt)
    cache_key = (TOKENISER_VERSION, dataset._fingerprint, encoder, tokenizer_key(tokenizer), dataset_name, *limits)
    # Row by row, so that the other columns stay as they are written.
    return _map(dataset, partial(_process_prompt, process=process), cache_key, num_proc, reading, max_prompt_length)


# One row: what `datasets` runs, in several processes where the user asks for it, so that all of it can be pickled.


@dataclass(frozen=True)
class _RowProcess:
    """Reads, encodes and checks one row. ``fit`` truncates it, or says why it must be dropped."""

    tokenizer: PreTrainedTokenizerBase
    encoder: RowEncoder
    name: str
    limits: Limits
    fit: Callable[[TokenisedRow, Limits], TokenisedRow] = truncate

    def __call__(self, row: dict[str, Any], index: int) -> list[TokenisedRow]:
        try:
            return [self.fit(encoded, self.limits) for encoded in self.encoder.encode(row, self.tokenizer)]
        except ValueError as error:
            if self.encoder.reading.bad_rows is None:
                raise ValueError(f"{self.name}, row {index + 1}: {error}") from error
            # A blank row stands for it until all bad rows are listed: its report holds the number and the reason.
            return [TokenisedRow(self.encoder.blank, dropped=UNREADABLE, error=str(error))]


# All rows


def _tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    encoder: RowEncoder,
    limits: Limits,
    num_proc: int | None,
) -> Dataset:
    dataset_name = name_of(dataset)
    report_unread_columns(dataset_name, renamed(columns_of(dataset), encoder.reading.form), encoder.read)
    process = _RowProcess(tokenizer, encoder, dataset_name, limits)
    # A stream has no fingerprint: its tokenised rows are never cached.
    fingerprint = getattr(dataset, "_fingerprint", "")
    cache_key = (TOKENISER_VERSION, fingerprint, encoder, tokenizer_key(tokenizer), dataset_name, *limits)
    return map_rows(dataset, process, cache_key, limits.max_length, num_proc, encoder.reading)


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All of a tokenizer that decides what a row becomes, for a cache key."""
    # By content: two folders with the same tokenizer share the cache, and a changed one does not.
    rules_as_json = json.dumps(tokenizer_rules(tokenizer), sort_keys=True)
    return tokenizer.chat_template, tokenizer.special_tokens_map, rules_as_json


def map_rows(
    dataset: Dataset | IterableDataset,
    process: Process,
    key: tuple[Any, ...],
    max_length: int,
    num_proc: int | None,
    reading: Reading,
) -> Any:
    """Tokenise all rows of a data set, or each row of a stream as it comes.

    Args:
        dataset: The rows.
        process: From a row and its index to tokenised rows.
        key: All that the result depends on, for the cache.
        max_length: The limit, for messages.
        num_proc: Number of processes.
        reading: How rows are read; names the file for bad rows.

    Returns:
        The columns of the tokenised rows, without those that are dropped.

    Raises:
        ValueError: There is no row, or none is left.
    """
    if isinstance(dataset, IterableDataset):
        return _map_stream(dataset, process)
    function = partial(_process_batch, process=process)
    # In batches, as one row of the file may become several.
    # The columns of the file have another number of rows then, so they are removed.
    options = {"batched": True, "batch_size": 200, "remove_columns": dataset.column_names}
    return _map(dataset, function, key, num_proc, reading, max_length, **options)


@workers_end_with_this_process()
def _map(
    dataset: Dataset,
    function: Callable[..., dict[str, Any]],
    key: tuple[Any, ...],
    num_proc: int | None,
    reading: Reading,
    max_length: int,
    **options: Any,
) -> Dataset:
    """Map, report, and leave out what is dropped."""
    dataset_name = name_of(dataset)
    if len(dataset) == 0:
        raise ValueError(f"{dataset_name}: no rows")
    # A fingerprint of our own: that of `datasets` would hash the tokenizer as an object, which changes when it is used.
    mapped_rows = dataset.map(
        partial(function, original_indices=_original_indices(dataset)),
        with_indices=True,
        new_fingerprint=Hasher.hash(key),
        num_proc=num_proc,
        desc=visible(f"Tokenising {dataset_name}"),
        **options,
    )
    # The report is a part of the table, so that a run that reads the cache says the same.
    report = {column: mapped_rows[column][:] for column in REPORT_COLUMNS}
    list_bad_rows(dataset_name, report, len(dataset), reading.bad_rows)
    report_rows(dataset_name, report, max_length)
    reasons = report["_drop"]
    rows_used = [index for index, reason in enumerate(reasons) if not reason]
    if not rows_used:
        raise ValueError(f"{dataset_name}: no row is left to train on ({reasons[0]}); check the columns and max_length")
    mapped_rows = mapped_rows.remove_columns(list(report))
    # `filter` would run over all rows again. Where none is dropped, a table without an index is faster to read.
    return mapped_rows if len(rows_used) == len(mapped_rows) else mapped_rows.select(rows_used)


def _original_indices(dataset: Dataset) -> np.ndarray | None:
    """The index in the file of each row of a data set that was selected, shuffled or filtered; None if it was not."""
    indices = dataset._indices
    return None if indices is None else indices.column(0).to_numpy()


def _process_batch(
    batch: dict[str, list[Any]], indices: list[int], process: Process, original_indices: np.ndarray | None
) -> dict[str, list[Any]]:
    """The tokenised rows of a batch, by columns, with their reports."""
    tokenised_rows = []
    for row_values, index in zip(zip(*batch.values(), strict=True), indices, strict=True):
        row = dict(zip(batch, row_values, strict=True))
        tokenised_rows += _process_row(row, index, process, original_indices)
    return {column: [tokenised_row[column] for tokenised_row in tokenised_rows] for column in tokenised_rows[0]}


def _process_prompt(
    row: dict[str, Any], index: int, process: Process, original_indices: np.ndarray | None
) -> dict[str, Any]:
    """The columns that a row of a prompt gets."""
    (result,) = _process_row(row, index, process, original_indices)
    return result


def _process_row(
    row: dict[str, Any], index: int, process: Process, original_indices: np.ndarray | None
) -> list[dict[str, Any]]:
    """The columns of tokenised rows, with their reports. Rows are counted as in the file."""
    file_index = index if original_indices is None else int(original_indices[index])
    return [tokenised_row.columns | tokenised_row.report(file_index) for tokenised_row in process(row, file_index)]


def _map_stream(rows: IterableDataset, process: Process) -> IterableDataset:
    """Tokenise the rows of a stream one by one; those that are dropped are counted.

    Raises:
        ValueError: No row is left among the first hundred.
    """
    dataset_name = name_of(rows)
    first_rows = (
        tokenised_row for index, row in enumerate(rows.take(SAMPLE_SIZE)) for tokenised_row in process(row, index)
    )
    first_row = next(first_rows, None)  # its columns are those of all rows
    if first_row is None:
        raise ValueError(f"{dataset_name}: no rows")
    columns = list(first_row.columns)
    report = StreamReport(dataset_name)

    def process_one(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        row = {column: values[0] for column, values in batch.items()}
        results = process(row, indices[0])
        for tokenised_row in results:
            report.add(tokenised_row, indices[0])
        return {
            column: [tokenised_row.columns[column] for tokenised_row in results if not tokenised_row.dropped]
            for column in columns
        }

    # A batch of one, as a row may become none or several, and no later row is read before it is needed.
    mapped_rows = rows.map(process_one, with_indices=True, batched=True, batch_size=1, remove_columns=columns_of(rows))
    mapped_rows = mapped_rows.select_columns(columns)  # without a column that only later rows have
    mapped_rows.info.dataset_name = dataset_name
    # Otherwise an empty stream would only show at the first step of training.
    if not list(mapped_rows.take(1)):
        raise ValueError(f"{dataset_name}: no row is left to train on; check the columns and max_length")
    return mapped_rows


def _without_plain_labels(rows: Dataset) -> Dataset:
    """Remove ``labels`` if every token of every answer is scored."""
    if isinstance(rows, IterableDataset):
        return rows
    # Without the column, answers are their own labels, and rows of pairs of ids need none.
    has_masked = any(IGNORE in answer for labels in rows["labels"] for answer in labels)
    return rows if has_masked else rows.remove_columns("labels")


def is_tokenised(dataset: Dataset | IterableDataset) -> bool:
    """Whether rows hold ids already.

    Args:
        dataset: The rows.

    Returns:
        True for the columns that the functions above return.
    """
    column_names = set(columns_of(dataset))
    known_columns = ({"input_ids", "labels"}, {"prompt_ids", "chosen_ids"}, {"prompt_ids"})
    return any(columns <= column_names for columns in known_columns)
