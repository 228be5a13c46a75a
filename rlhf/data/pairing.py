"""Prompts paired with other answers: good answers beside bad ones, and the answers to other prompts that KTO needs."""

import json
import logging
from functools import partial
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher

from rlhf.data.columns import RowFormat
from rlhf.data.formats import canonical, label, unpaired_dialogue
from rlhf.data.messages import Turns
from rlhf.data.streams import name_of
from rlhf.data.worker_processes import workers_end_with_this_process

logger = logging.getLogger(__name__)

BLOCK = 1000  # rows that exchange their answers
_VERSION = 1  # part of the cache key: raise it when the meaning of a row changes


def pairs_of_labelled(dataset: Dataset, row_format: RowFormat) -> Dataset:
    """Make pairs of rows with a ``label``: each good answer to a prompt with a bad one, in order.

    Args:
        dataset: Rows of a prompt, a completion and a label.
        row_format: How rows are read.

    Returns:
        Rows of ``prompt``, ``chosen`` and ``rejected``, with ``tools`` where there are any.

    Raises:
        ValueError: No prompt has both a good and a bad answer.
    """
    # By prompt and tools, in the order of the file.
    rows_of_prompt: dict[str, dict[str, Any]] = {}
    answers: dict[str, tuple[list[Turns], list[Turns]]] = {}
    for row in dataset:
        row = canonical(row, row_format)
        dialogue = unpaired_dialogue(row, row_format)
        # Messages are dicts, which cannot be keys themselves. Tools are a part of the question.
        prompt_key = json.dumps([dialogue.prompt, dialogue.tools], sort_keys=True, default=str)
        tools_column = {"tools": json.dumps(dialogue.tools)} if dialogue.tools else {}
        rows_of_prompt.setdefault(prompt_key, {"prompt": dialogue.prompt, **tools_column})
        good_answers, bad_answers = answers.setdefault(prompt_key, ([], []))
        (good_answers if label(row) else bad_answers).append(dialogue.completions[0])

    pairs = []
    for prompt_key, row in rows_of_prompt.items():
        good_answers, bad_answers = answers[prompt_key]
        for chosen, rejected in zip(good_answers, bad_answers, strict=False):  # as many as both have
            pairs.append({**row, "chosen": chosen, "rejected": rejected})
    if not pairs:
        raise ValueError(
            "rows with a 'label', but no prompt has both a good and a bad answer: train on them with `rlhf kto`"
        )
    logger.info(
        "%s: %d pairs from %d rows with a 'label', of prompts with good and bad answers (`rlhf kto` learns from all)",
        name_of(dataset),
        len(pairs),
        len(dataset),
    )
    paired_rows = Dataset.from_list([_with_json_lists(pair) for pair in pairs])
    paired_rows.info.dataset_name = dataset.info.dataset_name
    return paired_rows


def _with_json_lists(row: dict[str, Any]) -> dict[str, Any]:
    """Messages as JSON text: as a list, Arrow would give each message the keys of all."""
    return {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}


@workers_end_with_this_process()
def add_mismatched(rows: Any, max_length: int | None, num_proc: int | None = None) -> Any:
    """Add to unpaired rows the answer to another prompt, from which KTO estimates the KL term.

    The answer is that of the row before; the first rows of a block of 1000 get those of its last ones. If all prompts
    of a block are the same, their answers are exchanged all the same.

    Args:
        rows: A ``Dataset`` or an ``IterableDataset`` of ``prompt_ids``, ``completions`` (one) and ``labels``.
        max_length: Tokens of a prompt with that answer; the end of a longer answer is cut off. None for no limit.
        num_proc: Number of processes.

    Returns:
        The rows with ``mismatched`` and ``mismatched_labels``.
    """
    exchange = partial(_exchange_answers, max_length=max_length)
    if not isinstance(rows, Dataset):
        return rows.map(exchange, batched=True, batch_size=BLOCK)
    return rows.map(
        exchange,
        batched=True,
        batch_size=BLOCK,
        # All that the result depends on; the version stands for the code.
        new_fingerprint=Hasher.hash((rows._fingerprint, "mismatched", max_length, _VERSION)),
        num_proc=num_proc,
        desc="Pairing prompts with other answers",
    )


def _exchange_answers(block: dict[str, list[Any]], max_length: int | None) -> dict[str, list[Any]]:
    prompt_ids = block["prompt_ids"]
    mismatched, mismatched_labels = [], []
    for row_index, prompt in enumerate(prompt_ids):
        other_row = _row_of_another_prompt(prompt_ids, row_index)
        # This answer has to fit behind another prompt than its own, which may be longer.
        free_space = None if max_length is None else max(max_length - len(prompt), 0)
        mismatched.append([block["completions"][other_row][0][:free_space]])
        mismatched_labels.append([block["labels"][other_row][0][:free_space]])
    return {"mismatched": mismatched, "mismatched_labels": mismatched_labels}


def _row_of_another_prompt(prompts: list[list[int]], row: int) -> int:
    """The nearest row before ``row`` (around the end) with another prompt; the row before, if there is none."""
    num_rows = len(prompts)
    # Answers to one prompt mostly stand together, so the row before may have the same one.
    for distance in range(1, num_rows):
        other_row = (row - distance) % num_rows
        if prompts[other_row] != prompts[row]:
            return other_row
    return (row - 1) % num_rows
