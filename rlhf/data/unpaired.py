"""Prompts beside answers to others, from which KTO estimates how far the policy is from its reference."""

from functools import partial
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher

BLOCK = 1000  # rows that exchange their answers
_VERSION = 1  # part of the cache key: raise it when the meaning of a row changes


def add_mismatched(rows: Any, max_length: int | None, num_proc: int | None = None) -> Any:
    """Tokenised unpaired rows, with ``mismatched`` and ``mismatched_labels``: the answer of a row before, to another
    prompt, cut to ``max_length`` together with the row's own prompt.

    The first rows get the answers of the last ones, within blocks of 1000 rows. A block of a single prompt exchanges
    answers all the same.

    Args:
        rows: a ``Dataset`` or an ``IterableDataset`` of ``prompt_ids``, ``completions`` (one) and ``labels``.
    """
    exchange = partial(_exchange, max_length=max_length)
    if not isinstance(rows, Dataset):
        return rows.map(exchange, batched=True, batch_size=BLOCK)
    return rows.map(
        exchange,
        batched=True,
        batch_size=BLOCK,
        new_fingerprint=Hasher.hash((rows._fingerprint, "mismatched", max_length, _VERSION)),
        num_proc=num_proc,
        desc="Pairing prompts with other answers",
    )


def _exchange(block: dict[str, list[Any]], max_length: int | None) -> dict[str, list[Any]]:
    prompts = block["prompt_ids"]
    count = len(prompts)
    mismatched, labels = [], []
    for row, prompt in enumerate(prompts):
        others = ((row - back) % count for back in range(1, count))
        other = next((index for index in others if prompts[index] != prompt), (row - 1) % count)
        room = None if max_length is None else max(max_length - len(prompt), 0)
        mismatched.append([block["completions"][other][0][:room]])
        labels.append([block["labels"][other][0][:room]])
    return {"mismatched": mismatched, "mismatched_labels": labels}
