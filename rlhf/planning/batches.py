"""The batches of a run before it begins: which is the largest, and how many tokens it has."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from rlhf.data.packing import Packed, longest_sequences, num_tokens
from rlhf.trainers.base import BaseTrainer

STREAM_BATCHES = 32  # that are read of a stream: its largest batch is not known


@dataclass(frozen=True)
class Micro:
    """A micro-batch as the trainer computes its loss.

    Attributes:
        batch: on the device.
        count: what the loss is divided by.
    """

    batch: Any
    count: Any


@dataclass(frozen=True)
class BatchSizes:
    """The micro-batches of a run, or of its first epoch, of this process.

    Attributes:
        rows: the indices of the rows of each.
        tokens: the tokens of each; padding counts where the model reads it.
        padded: whether the model reads padding.
    """

    rows: list[list[int]]
    tokens: np.ndarray
    padded: bool

    @property
    def largest(self) -> list[int]:
        """Rows of the micro-batch with the most tokens."""
        return self.rows[int(self.tokens.argmax())]

    def typical(self, count: int) -> list[list[int]]:
        """Rows of micro-batches of about the mean size.

        Args:
            count: how many.

        Returns:
            The micro-batches whose sizes are next to the mean.
        """
        order = np.argsort(np.abs(self.tokens - self.tokens.mean()), kind="stable")
        return [self.rows[index] for index in order[:count]]

    def spread(self, count: int) -> list[list[int]]:
        """Rows of micro-batches of different sizes, from small to large.

        Args:
            count: how many, at most.

        Returns:
            The micro-batches at the middles of ``count`` equal parts of all sizes; the mean of theirs is near that of
            all.
        """
        order = np.argsort(self.tokens, kind="stable")
        count = min(count, len(order))
        middles = ((np.arange(count) + 0.5) * len(order) / count).astype(int)
        return [self.rows[order[index]] for index in middles]


def sizes_of_rows(rows: Any) -> np.ndarray:
    """Tokens of each item of the training data.

    Args:
        rows: a tokenised ``Dataset``, or rows that are packed.

    Returns:
        int64 [items].
    """
    if isinstance(rows, Packed):
        row_lengths = num_tokens(rows.rows)
        return np.array([row_lengths[indices].sum() for indices in rows.bins])
    return num_tokens(rows)


def batch_sizes(trainer: BaseTrainer, loader: Any, count: int) -> BatchSizes | None:
    """The micro-batches of a run, or of its first epoch, in the order of training.

    Args:
        trainer: the rows, and how they are laid out.
        loader: the trainer's own loader of training rows.
        count: micro-batches of the run.

    Returns:
        None for a stream.
    """
    rows = trainer.train_dataset
    if not isinstance(rows, Dataset | Packed) or getattr(loader, "batch_sampler", None) is None:
        return None
    row_lengths = sizes_of_rows(rows)
    indices = [[int(index) for index in batch] for batch in islice(iter(loader.batch_sampler), count)]
    padded = getattr(trainer.data_collator, "layout", "rows") != "segments"
    if padded and isinstance(rows, Dataset):
        # A padded row of a pair is read as two sequences of the longest length.
        longest = longest_sequences(rows)
        tokens = [longest[batch].max() * len(batch) for batch in indices]
    else:
        tokens = [row_lengths[batch].sum() for batch in indices]
    return BatchSizes(indices, np.array(tokens), padded)


def make_micro(trainer: BaseTrainer, items: list[Any]) -> Micro:
    """Collate items of the training data as the trainer does.

    Args:
        trainer: the collator, and what it adds to a batch.
        items: of the training data.

    Returns:
        The micro-batch.
    """
    collates_late = getattr(trainer, "_collates_late", False)
    raw: Any = items if collates_late else trainer.data_collator(items)
    (batch,), count = trainer.get_batch_samples(iter([raw]), 1, trainer.args.device)
    return Micro(batch.to(trainer.args.device), count)


def largest_of_stream(trainer: BaseTrainer, loader: Any) -> Micro:
    """The largest of the first batches of a stream.

    Args:
        trainer: of the run.
        loader: the trainer's own loader of training rows.

    Returns:
        The micro-batch.
    """
    batches: Iterator[Any] = islice(iter(loader), STREAM_BATCHES)
    largest = max(batches, key=lambda batch: batch.input_ids.numel())
    largest = largest.to(trainer.args.device)
    return Micro(largest, torch.ones((), device=trainer.args.device) * max(trainer.count(largest), 1))
