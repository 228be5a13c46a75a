"""A step whose loss or gradient is not finite: which rows it read, and what is said of it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from rlhf.data import Batch, Packed
from rlhf.data.searching import find_row, ids_of_sequences
from rlhf.data.streams import name_of

MAX_NAMED = 5  # rows of a process that a message names
_SHOWN_TEXT = 40  # characters of a row


@dataclass
class StepRecord:
    """What this process reads and computes in one optimizer step, kept until its gradient has been looked at.

    Args:
        batches: of all its micro-batches, in order.
        losses: of each micro-batch so far, the loss of each item: a sequence, or a pair.
        totals: of each micro-batch so far, its share of the loss of the step.
        undo: these give metrics the values from before the step; None where a step is never left out.
    """

    batches: list[Batch] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    totals: list[Tensor] = field(default_factory=list)
    undo: list[Callable[[], None]] | None = None

    def add(self, total: Tensor, losses: Tensor) -> None:
        """Note the loss of the next micro-batch; of one that belongs to no step, nothing.

        Args:
            total: its share of the loss of the step.
            losses: of its items.
        """
        if len(self.losses) < len(self.batches):
            self.totals.append(total.detach())
            self.losses.append(losses.detach())

    def has_bad_loss(self, device: torch.device) -> Tensor:
        """Whether a loss is not finite, as 1 or 0; on the device, which nobody waits for.

        Args:
            device: of the losses.
        Returns:
            A scalar.
        """
        if not self.totals:
            return torch.zeros((), device=device)
        return (~torch.stack(self.totals).isfinite()).any().float()

    def bad_losses(self) -> list[float]:
        """The losses that are not finite, of items where they tell it."""
        of_items = [loss for losses in self.losses for loss in losses.tolist()]
        of_batches = [total.item() for total in self.totals]
        bad_items = [loss for loss in of_items if not math.isfinite(loss)]
        return bad_items or [total for total in of_batches if not math.isfinite(total)]

    def bad_sequences(self) -> list[list[int]]:
        """Token ids of the items whose loss is not finite; of a pair, the chosen answer with its prompt."""
        return [ids for ids, loss in self._items() if not math.isfinite(loss)] or self.all_sequences()

    def all_sequences(self) -> list[list[int]]:
        """Token ids of all items."""
        return [ids for ids, _ in self._items()]

    def _items(self) -> Iterable[tuple[list[int], float]]:
        for batch, losses in zip(self.batches, self.losses, strict=False):
            ids = ids_of_sequences(batch)
            item_size = max(len(ids) // max(len(losses), 1), 1)
            yield from zip(ids[::item_size], losses.tolist(), strict=False)


@dataclass(frozen=True)
class RowSource:
    """Where training rows came from.

    Args:
        name: of the file or the data set.
        num_rows: before any was left out; None where they cannot be counted.
    """

    name: str
    num_rows: int | None

    @classmethod
    def of(cls, rows: Any) -> "RowSource | None":
        """The source of rows as the user passed them; None for a stream or a mixture."""
        return cls(name_of(rows), len(rows)) if isinstance(rows, Dataset) else None

    def describe(self, rows: Dataset, index: int) -> str:
        """Name a row, by its number in the file where that is known.

        Args:
            rows: tokenised rows.
            index: among these.
        Returns:
            Such as "row 17 of data.jsonl".
        """
        # Rows that were left out are behind an index. A pair that became two rows changes their number.
        if rows._data.num_rows != self.num_rows:
            return f"row {index + 1} of {len(rows)} tokenised rows"
        file_index = index if rows._indices is None else rows._indices.column(0)[index].as_py()
        return f"row {file_index + 1} of {self.name}"


def describe_rows(sequences: list[list[int]], rows: Any, source: RowSource | None, tokenizer: Any) -> list[str]:
    """Name the rows of a step.

    Args:
        sequences: token ids of each.
        rows: the training rows.
        source: where they came from.
        tokenizer: the model's.
    Returns:
        A text for each of the first rows, such as ``row 17 of data.jsonl ('The cat')``.
    """
    table = rows.rows if isinstance(rows, Packed) else rows
    described: list[str] = []
    for ids in sequences[:MAX_NAMED]:
        index = find_row(table, ids) if isinstance(table, Dataset) else None
        place = "a row"  # of a stream, or sampled by the student
        if index is not None:
            place = (source or RowSource("", None)).describe(table, index)
        text = tokenizer.decode(ids[: 2 * _SHOWN_TEXT])[:_SHOWN_TEXT]
        described.append(f"{place} ({text!r})")
    if len(sequences) > MAX_NAMED:
        described.append(f"{len(sequences) - MAX_NAMED} more")
    return described


def describe_step(step: int, norm: Any, bad_losses: list[float], rows: list[str]) -> str:
    """What is said of a step that is not finite.

    Args:
        step: its number.
        norm: of its gradient; None if nobody knows it.
        bad_losses: those that are not finite.
        rows: the rows that have them; where there is none, all rows of the step.
    Returns:
        One line, without what to do.
    """
    unique_rows = list(dict.fromkeys(rows))
    if bad_losses:
        return f"step {step}: the loss is {bad_losses[0]} for {', '.join(unique_rows)}"
    return f"step {step}: the gradient is not finite (norm {float(norm)}), though the loss is; {', '.join(unique_rows)}"
