"""From token rows to a :class:`Batch`: laid out without padding or in padded rows, with the targets of the loss."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf.data.batch import IGNORE, Batch, Layout, Movable, Row, Segments, Span, sequences
from rlhf.logprobs import Targets


class SequenceColumn(NamedTuple):
    """A number for each sequence of a batch, read off the columns of its rows.

    Args:
        name: in :attr:`Batch.per_sequence`.
        read_from: columns of a row, one for each of its sequences; a single one holds for all of them.
        dtype: of the tensor.
    """

    name: str
    read_from: tuple[str, ...]
    dtype: torch.dtype = torch.float32

    def is_in(self, row: Row) -> bool:
        """Whether the row has all these columns."""
        return all(column in row for column in self.read_from)

    def stack(self, rows: list[Row]) -> Tensor:
        """The numbers of all sequences, [S]."""
        numbers: list[float] = []
        for row in rows:
            of_row = [row[column] for column in self.read_from]
            if len(of_row) == 1:  # one number for all sequences of the row, such as a pair's margin
                of_row *= len(sequences(row))
            numbers += of_row
        return torch.tensor(numbers, dtype=self.dtype)


PER_SEQUENCE = (
    # Pairs store a reference log-prob for each of both answers, other rows a single one.
    SequenceColumn("ref_logps", ("ref_chosen_logps", "ref_rejected_logps")),
    SequenceColumn("ref_logps", ("ref_logps",)),
    SequenceColumn("margin", ("margin",)),
    SequenceColumn("desirable", ("desirable",), torch.bool),
)

Extra = Callable[[list[Row], "Collator"], Movable | None]
"""From the examples of a batch and their collator to an entry of :attr:`Batch.extras`; None for no entry."""


def mismatched_batch(examples: list[Row], collate: "Collator") -> Batch | None:
    """The same prompts with the answers to other prompts (:func:`rlhf.data.add_mismatched`), where rows have them."""
    if "mismatched" not in examples[0]:
        return None
    rows = []
    for example in examples:
        row = {
            "prompt_ids": example["prompt_ids"],
            "completions": example["mismatched"],
            "labels": example["mismatched_labels"],
        }
        if "ref_mismatched_logps" in example:
            row["ref_logps"] = example["ref_mismatched_logps"]
        rows.append(row)
    # Extras belong to the actual answers: computed here, they would describe the wrong ones.
    return replace(collate, extras={})(rows)


EXTRAS: Mapping[str, Extra] = {"mismatched": mismatched_batch}


@dataclass(frozen=True)
class Collator:
    """Lay out examples; one with k completions becomes sequences ``k * i`` … ``k * i + k - 1``.

    Args:
        pad_token_id: any id, EOS too: what counts is decided by lengths, never by comparing ids.
        padding_side: of ``"rows"``.
        layout: ``"segments"`` puts all tokens in one row without padding, and a prompt once for all its completions;
            the model needs :func:`rlhf.models.use_segments`. ``"rows"`` pads, which any model takes.
        per_sequence: columns that are stacked where the rows have them.
        extras: further entries of a batch, by name, each with the function that makes it.
    """

    pad_token_id: int = 0
    padding_side: Literal["left", "right"] = "right"
    layout: Layout = "rows"
    per_sequence: tuple[SequenceColumn, ...] = PER_SEQUENCE
    extras: Mapping[str, Extra] = field(default_factory=lambda: EXTRAS)

    def __call__(self, rows: list[Row]) -> Batch:
        # A packed row is a list of examples.
        examples = [example for row in rows for example in row.get("examples", [row])]
        batch = self._flat(examples) if self.layout == "segments" else self._padded(examples)
        # The first example stands for all: the rows of a data set have the same columns.
        columns = [column for column in self.per_sequence if column.is_in(examples[0])]
        extras = {name: make(examples, self) for name, make in self.extras.items()}
        return replace(
            batch,
            per_sequence={column.name: column.stack(examples) for column in columns},
            extras={name: extra for name, extra in extras.items() if extra is not None},
        )

    def _flat(self, examples: list[Row]) -> Batch:
        """All sequences in one row, [1, T], without padding."""
        spans: list[Span] = []
        ids: list[int] = []
        positions: list[Tensor] = []
        sources: list[Tensor] = []
        tokens: list[Tensor] = []
        owners: list[Tensor] = []
        for example in examples:
            first_span, example_start = len(spans), len(ids)
            for sequence in sequences(example):
                prefix, length = sequence.prefix, len(sequence.ids)
                spans.append(Span(length, first_span, prefix) if prefix else Span(length))
                labels = torch.tensor(sequence.labels, dtype=torch.int64)  # int64 for an empty list too
                scored = (labels != IGNORE).nonzero().squeeze(1)
                if not prefix:
                    # Nothing comes before the first token of a sequence, so nothing predicts it.
                    scored = scored[scored > 0]
                source = len(ids) + scored - 1
                if prefix:
                    # The first token of a branch is predicted by the last one of the prompt.
                    source[scored == 0] = example_start + prefix - 1
                ids += sequence.ids
                # Positions count from the start of the prompt, also in a branch.
                positions.append(torch.arange(prefix, prefix + length))
                sources.append(source)
                tokens.append(labels[scored])
                owners.append(torch.full_like(scored, len(owners)))
        targets = Targets(torch.cat(sources), torch.cat(tokens), torch.cat(owners), len(owners))
        input_ids = torch.tensor(ids)[None]
        position_ids = torch.cat(positions)[None]
        # Nothing is padding here. Which tokens see each other is decided by the segments, not by this mask.
        return Batch(input_ids, torch.ones_like(input_ids), position_ids, targets, Segments(tuple(spans)))

    def _padded(self, examples: list[Row]) -> Batch:
        """A row for each sequence, [S, T], each with its prompt."""
        whole = [sequence for example in examples for sequence in _with_prompt(example)]
        width = max(len(ids) for ids, _ in whole)
        shape = (len(whole), width)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORE)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        for index, (ids, labels_of_row) in enumerate(whole):
            first = 0 if self.padding_side == "right" else width - len(ids)
            used = slice(first, first + len(ids))
            input_ids[index, used] = torch.tensor(ids)
            labels[index, used] = torch.tensor(labels_of_row)
            attention_mask[index, used] = 1
            # Counted from the first token, so that padding on the left shifts no position.
            position_ids[index, used] = torch.arange(len(ids))
        return Batch(input_ids, attention_mask, position_ids, Targets.from_labels(labels, attention_mask))


def _with_prompt(example: Row) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of each sequence, with its prompt before them."""
    first, *_ = parts = sequences(example)
    for ids, labels, prefix in parts:
        yield first.ids[:prefix] + ids, [IGNORE] * prefix + labels
