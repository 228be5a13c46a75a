"""Rows of text to rows of token ids: checked, truncated and counted, with a progress bar and a cache."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from rlhf.data import chat, columns, formats
from rlhf.data.batch import IGNORE
from rlhf.data.columns import RowFormat
from rlhf.data.encoding import (
    COUNTS,
    Reading,
    Row,
    check_vocabulary,
    cut,
    dropped,
    encode_pair,
    encode_sft,
    encode_unpaired,
)
from rlhf.data.streams import columns_of, tokenised_stream
from rlhf.data.vocabulary import tokenizer_rules

logger = logging.getLogger(__name__)

UNLIMITED = 1 << 40  # where max_length is None
TOKENISER_VERSION = 4  # part of the cache key: raise it when the meaning of a tokenised row changes
_REPORT = ("_cut", "_drop", "_bad", "_row", *COUNTS)


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
    """Rows of ``input_ids`` and ``labels`` (−100 where nothing is learned) from any of the known columns.

    A row longer than ``max_length`` loses its end; a row left without a scored token is dropped; both are reported.

    Raises:
        ValueError: names the data set, the row and the remedy.
    """
    reading = (reading or Reading()).for_tokenizer(tokenizer, text_field, dataset)
    name = name_of(dataset)
    with prefixed(name):
        names = columns.renamed(column_names(dataset), reading.form)
        read = columns.sft_columns(names, text_field)
    column = read[0]
    if "rejected" in read:
        logger.info("%s: preference rows; their chosen answers are scored", name)
    elif "label" in read and formats.has_labels(dataset, reading.form):
        logger.info("%s: rows with a 'label'; answers with label true are learned, the others left out", name)
    _tell_unread(name, names, read)
    encode = partial(encode_sft, tokenizer=tokenizer, column=column, reading=reading)
    blank = {"input_ids": [0], "labels": [IGNORE]}
    return _tokenize(
        dataset, tokenizer, encode, ("sft", column, reading), blank, max_length, vocab_size, drop_long_prompts, num_proc
    )


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
    """Rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``; truncation cuts the answers, never the prompt.

    ``labels``, for each of both, are there where some of their tokens are not scored. Unpaired rows (``completion`` and
    ``label``) are paired where a prompt has good and bad answers.

    Args:
        margin: keep the column ``margin``, where there is one.
    Raises:
        ValueError: names the data set, the row and the remedy.
    """
    reading = (reading or Reading()).for_tokenizer(tokenizer, rows=dataset)
    with prefixed(name_of(dataset)):
        names = columns.renamed(column_names(dataset), reading.form)
        if "label" in names and "chosen" not in names and isinstance(dataset, Dataset):
            dataset = pairs_of_labelled(dataset, reading.form)
            reading = replace(reading, form=replace(reading.form, columns={}))
        else:
            columns.pair_columns(names)
    names = columns.renamed(column_names(dataset), reading.form)
    margin = margin and "margin" in names
    ready = "chosen_ids" in names
    _tell_unread(name_of(dataset), names, (*columns.pair_columns(names), *(["margin"] if margin else [])))
    encode = partial(encode_pair, tokenizer=tokenizer, ready=ready, margin=margin, form=reading.form)
    blank: Row = {"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0], "labels": [[IGNORE], [IGNORE]]}
    blank |= {"margin": 0.0} if margin else {}
    what = ("pair", margin, reading)
    rows = _tokenize(dataset, tokenizer, encode, what, blank, max_length, vocab_size, drop_long_prompts, num_proc)
    return _without_plain_labels(rows)


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
    """Rows of ``prompt_ids``, ``completions`` (one), ``labels`` (of its tokens) and ``desirable``.

    A row with ``chosen`` and ``rejected`` becomes two.

    Raises:
        ValueError: names the data set, the row and the remedy.
    """
    reading = (reading or Reading()).for_tokenizer(tokenizer, rows=dataset)
    with prefixed(name_of(dataset)):
        pairs = columns.check_unpaired_columns(column_names(dataset), reading.form)
        names = columns.renamed(column_names(dataset), reading.form)
        read = columns.pair_columns(names) if pairs else (*columns.sft_columns(names), "label")
    _tell_unread(name_of(dataset), names, read)
    encode = partial(encode_unpaired, tokenizer=tokenizer, pairs=pairs, form=reading.form)
    blank = {"prompt_ids": [0], "completions": [[0]], "labels": [[IGNORE]], "desirable": False}
    what = ("unpaired", pairs, reading)
    return _tokenize(dataset, tokenizer, encode, what, blank, max_length, vocab_size, drop_long_prompts, num_proc)


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
    """The rows as they are, which reward functions read, with ``prompt_ids`` added.

    Raises:
        ValueError: names the data set, the row and the remedy.
    """
    reading = (reading or Reading()).for_tokenizer(tokenizer, rows=dataset)
    name = name_of(dataset)
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{name}: prompts to answer are counted before training: leave out --streaming")
    if len(dataset) == 0:
        raise ValueError(f"{name}: no rows")
    with prefixed(name):
        columns.check_prompt_columns(dataset.column_names, reading.form)
    options = (max_prompt_length, vocab_size, drop_long_prompts, reading)
    key = (TOKENISER_VERSION, dataset._fingerprint, "prompt", identity(tokenizer), name, options)
    mapped = dataset.map(
        partial(
            _encode_prompt, tokenizer=tokenizer, name=name, longest=max_prompt_length, vocab_size=vocab_size,
            drop=drop_long_prompts, reading=reading, places=_places(dataset),
        ),
        with_indices=True,
        new_fingerprint=Hasher.hash(key),
        num_proc=num_proc,
        desc=f"Tokenising {name}",
    )  # fmt: skip
    bad = [(row + 1, why) for row, why in zip(mapped["_row"], mapped["_bad"], strict=True) if why]
    _list_bad_rows(name, bad, len(mapped), reading)
    wrong = {index for index, why in enumerate(mapped["_bad"]) if why}
    kept = [i for i, ids in enumerate(mapped["prompt_ids"]) if i not in wrong and len(ids) <= max_prompt_length]
    mapped = mapped.remove_columns(["_bad", "_row"])
    if len(kept) == len(mapped):
        return mapped
    if long := len(mapped) - len(kept) - len(bad):
        logger.warning("%s: dropped %d of %d rows with too long a prompt", name, long, len(mapped))
    if not kept:
        raise ValueError(f"{name}: no row is left; raise --max_length, or lower --max_completion_length")
    return mapped.select(kept)


def _encode_prompt(
    row: Row,
    index: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    longest: int,
    vocab_size: int,
    drop: bool,
    reading: Reading,
    places: np.ndarray | None,
) -> Row:
    index = index if places is None else int(places[index])
    try:
        dialogue = formats.prompt_dialogue(formats.canonical(row, reading.form), reading.form)
        ids = chat.encode_prompt(tokenizer, dialogue)
        if not ids:
            raise ValueError("'prompt' is empty")
        check_vocabulary({"prompt": ids}, vocab_size)
        if len(ids) > longest and not drop:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, max_length less max_completion_length leaves room for {longest}: "
                "raise --max_length, or pass --drop_long_prompts to leave such rows out"
            )
    except ValueError as error:
        if reading.bad_rows is None:
            raise ValueError(f"{name}, row {index + 1}: {error}") from error
        return {"prompt_ids": [0], "_bad": str(error), "_row": index}
    return {"prompt_ids": ids, "_bad": "", "_row": index}


def pairs_of_labelled(dataset: Dataset, form: RowFormat) -> Dataset:
    """Pairs of unpaired rows: the good answers to a prompt beside its bad ones, in order."""
    answers: dict[str, tuple[Row, dict[bool, list[Any]]]] = {}
    for row in dataset:
        row = formats.canonical(row, form)
        dialogue = formats.unpaired_dialogue(row, form)
        key = json.dumps([dialogue.prompt, dialogue.tools], sort_keys=True, default=str)
        kept = {"tools": json.dumps(dialogue.tools)} if dialogue.tools else {}
        found = answers.setdefault(key, ({"prompt": dialogue.prompt, **kept}, {True: [], False: []}))
        found[1][formats.label(row)].append(dialogue.completions[0])
    pairs = [
        {**row, "chosen": chosen, "rejected": rejected}
        for row, found in answers.values()
        for chosen, rejected in zip(found[True], found[False], strict=False)
    ]
    if not pairs:
        raise ValueError(
            "rows with a 'label', but no prompt has both a good and a bad answer: train on them with `rlhf kto`"
        )
    logger.info(
        "%s: %d pairs from %d rows with a 'label', of prompts with good and bad answers (`rlhf kto` learns from all)",
        name_of(dataset), len(pairs), len(dataset),
    )  # fmt: skip
    made = Dataset.from_list(
        [{key: json.dumps(v) if isinstance(v, list) else v for key, v in p.items()} for p in pairs]
    )
    made.info.dataset_name = dataset.info.dataset_name
    return made


# All rows


def _process(
    row: Row,
    index: int,
    *,
    encode: Callable[[Row], list[Row]],
    name: str,
    max_length: int,
    vocab_size: int,
    drop: bool,
    blank: Row | None,
) -> list[Row]:
    """The tokenised rows of one row; ``blank`` stands for a bad one, or None to stop there."""
    try:
        done = [cut(encoded, max_length, vocab_size, drop) for encoded in encode(row)]
    except ValueError as error:
        if blank is None:
            raise ValueError(f"{name}, row {index + 1}: {error}") from error
        done = [cut(dropped(blank, "that cannot be read"), max_length, vocab_size, drop) | {"_bad": str(error)}]
    return [{**one, "_bad": one.get("_bad", ""), "_row": index} for one in done]


def _tokenize(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[Row], list[Row]],
    what: tuple[Any, ...],
    blank: Row,
    max_length: int | None,
    vocab_size: int,
    drop: bool,
    num_proc: int | None,
) -> Dataset:
    name, max_length = name_of(dataset), UNLIMITED if max_length is None else max_length
    reading: Reading = what[-1]
    process = partial(
        _process, encode=encode, name=name, max_length=max_length, vocab_size=vocab_size, drop=drop,
        blank=None if reading.bad_rows is None else blank,
    )  # fmt: skip
    key = (
        TOKENISER_VERSION,
        getattr(dataset, "_fingerprint", ""),
        what,
        identity(tokenizer),
        name,
        max_length,
        vocab_size,
        drop,
    )
    return map_rows(dataset, process, key, max_length, num_proc, reading)


def identity(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All of a tokenizer that decides what a row becomes."""
    rules = json.dumps(tokenizer_rules(tokenizer), sort_keys=True)
    return tokenizer.chat_template, tokenizer.special_tokens_map, rules


def map_rows(
    dataset: Dataset,
    process: Callable[[Row, int], list[Row]],
    key: tuple[Any, ...],
    max_length: int,
    num_proc: int | None,
    reading: Reading,
) -> Dataset:
    """Rows by ``process``, which gives what :func:`cut` does; ``key`` is all that they depend on."""
    name = name_of(dataset)
    if isinstance(dataset, IterableDataset):
        return tokenised_stream(dataset, process, _REPORT)
    if len(dataset) == 0:
        raise ValueError(f"{name}: no rows")
    mapped = dataset.map(
        partial(_process_batch, process=process, places=_places(dataset)),
        with_indices=True,
        batched=True,
        batch_size=200,
        remove_columns=dataset.column_names,
        new_fingerprint=Hasher.hash(key),
        num_proc=num_proc,
        desc=f"Tokenising {name}",
    )
    report = {column: mapped[column][:] for column in _REPORT if column in mapped.column_names}
    _list_bad_rows(
        name,
        [(row + 1, why) for row, why in zip(report["_row"], report["_bad"], strict=True) if why],
        len(dataset),
        reading,
    )
    _tell_counts(name, report, max_length)
    kept = [index for index, reason in enumerate(report["_drop"]) if not reason]
    if not kept:
        raise ValueError(f"{name}: no row is left to train on ({report['_drop'][0]}); check the columns and max_length")
    mapped = mapped.remove_columns(list(report))
    return mapped if len(kept) == len(mapped) else mapped.select(kept)


def _places(dataset: Dataset) -> np.ndarray | None:
    """Where the rows stood before they were selected, shuffled or filtered; None where nothing was."""
    indices = dataset._indices
    return None if indices is None else indices.column(0).to_numpy()


def _process_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    process: Callable[[Row, int], list[Row]],
    places: np.ndarray | None = None,
) -> dict[str, list[Any]]:
    indices = indices if places is None else places[indices].tolist()
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    done = [one for row, index in zip(rows, indices, strict=True) for one in process(row, index)]
    return {column: [one[column] for one in done] for column in done[0]}


def _tell_counts(name: str, report: dict[str, list[Any]], max_length: int) -> None:
    """Say what was dropped, cut, and not scored."""
    reasons, cuts = report["_drop"], report["_cut"]
    for reason in sorted(set(reasons) - {"", "that cannot be read"}):
        logger.warning("%s: dropped %d of %d rows %s", name, reasons.count(reason), len(reasons), reason)
    if any(cuts):
        logger.warning(
            "%s: %d of %d rows cut to max_length %d, losing %d tokens in all",
            name, sum(cut > 0 for cut in cuts), len(cuts), max_length, sum(cuts),
        )  # fmt: skip
    answers, scored = sum(report.get("_answers", [])), sum(report.get("_scored", []))
    if scored < answers:
        logger.warning("%s: %d of %d answers are scored", name, scored, answers)
    noted: dict[str, list[int]] = {}
    for row, notes in zip(report["_row"], report.get("_notes", []), strict=False):
        for note in notes:
            noted.setdefault(note, []).append(row + 1)
    for note, rows in noted.items():
        logger.warning("%s, row %d: %s (%d of %d rows)", name, rows[0], note, len(rows), len(reasons))


def _list_bad_rows(name: str, bad: list[tuple[int, str]], rows: int, reading: Reading) -> None:
    if not bad or reading.bad_rows is None:
        return
    path = Path(reading.bad_rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"file": name, "row": row, "error": why}, ensure_ascii=False) for row, why in bad]
    listed = path.read_text(encoding="utf-8").splitlines() if path.exists() else []  # by other sets, or before
    path.write_text("\n".join(dict.fromkeys([*listed, *lines])) + "\n", encoding="utf-8")
    logger.warning("%s: left out %d of %d rows that cannot be read, listed in %s; first, row %d: %s",
                   name, len(bad), rows, path, *bad[0])  # fmt: skip
    if len(bad) == rows:
        raise ValueError(f"{name}: none of {rows} rows can be read; row {bad[0][0]}: {bad[0][1]}")


def _tell_unread(name: str, names: list[str], read: tuple[str, ...]) -> None:
    if unread := [column for column in names if column not in read]:
        logger.info("%s: columns not read: %s", name, ", ".join(unread))


def _without_plain_labels(rows: Dataset) -> Dataset:
    """Without ``labels`` where every token of every answer is scored."""
    if isinstance(rows, IterableDataset):
        return rows
    masked = any(IGNORE in side for labels in rows["labels"] for side in labels)
    return rows if masked else rows.remove_columns("labels")


def is_tokenised(dataset: Dataset) -> bool:
    """Whether rows hold ids already."""
    names = set(column_names(dataset))
    return any(columns <= names for columns in ({"input_ids", "labels"}, {"prompt_ids", "chosen_ids"}, {"prompt_ids"}))


def column_names(dataset: Dataset) -> list[str]:
    return columns_of(dataset)


def name_of(dataset: Dataset) -> str:
    return dataset.info.dataset_name or "dataset"


@contextmanager
def prefixed(where: str) -> Iterator[None]:
    """Begin a ValueError with where it was found."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
