"""From token rows to a :class:`Batch`: laid out without padding or in padded rows, with the targets of the loss."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf.data.batch import IGNORE, Batch, Layout, Movable, Row, sequences
from rlhf.data.segments import Segments, Span
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
            row_values = [row[column] for column in self.read_from]
            if len(row_values) == 1:  # one number for all sequences of the row, such as a pair's margin
                row_values *= len(sequences(row))
            numbers += row_values
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
        extras = {name: make_extra(examples, self) for name, make_extra in self.extras.items()}
        return replace(
            batch,
            per_sequence={column.name: column.stack(examples) for column in columns},
            extras={name: extra_entry for name, extra_entry in extras.items() if extra_entry is not None},
        )

    def _flat(self, examples: list[Row]) -> Batch:
        """All sequences in one row, [1, T], without padding."""
        spans: list[Span] = []
        flat_ids: list[int] = []
        position_spans: list[Tensor] = []
        predicting_rows: list[Tensor] = []
        target_ids: list[Tensor] = []
        target_sequences: list[Tensor] = []
        for example in examples:
            first_span, example_start = len(spans), len(flat_ids)
            for sequence in sequences(example):
                prefix, sequence_length = sequence.prefix, len(sequence.ids)
                spans.append(Span(sequence_length, first_span, prefix) if prefix else Span(sequence_length))
                labels = torch.tensor(sequence.labels, dtype=torch.int64)  # int64 for an empty list too
                scored_positions = (labels != IGNORE).nonzero().squeeze(1)
                if not prefix:
                    # Nothing comes before the first token of a sequence, so nothing predicts it.
                    scored_positions = scored_positions[scored_positions > 0]
                sequence_sources = len(flat_ids) + scored_positions - 1
                if prefix:
                    # The first token of a branch is predicted by the last one of the prompt.
                    sequence_sources[scored_positions == 0] = example_start + prefix - 1
                flat_ids += sequence.ids
                # Positions count from the start of the prompt, also in a branch.
                position_spans.append(torch.arange(prefix, prefix + sequence_length))
                predicting_rows.append(sequence_sources)
                target_ids.append(labels[scored_positions])
                target_sequences.append(torch.full_like(scored_positions, len(target_sequences)))
        targets = Targets(
            torch.cat(predicting_rows), torch.cat(target_ids), torch.cat(target_sequences), len(target_sequences)
        )
        input_ids = torch.tensor(flat_ids)[None]
        position_ids = torch.cat(position_spans)[None]
        # Nothing is padding here. Which tokens see each other is decided by the segments, not by this mask.
        return Batch(input_ids, torch.ones_like(input_ids), position_ids, targets, Segments.of(tuple(spans)))

    def _padded(self, examples: list[Row]) -> Batch:
        """A row for each sequence, [S, T], each with its prompt."""
        whole_sequences = [sequence for example in examples for sequence in _with_prompt(example)]
        row_width = max(len(token_ids) for token_ids, _ in whole_sequences)
        batch_shape = (len(whole_sequences), row_width)
        input_ids = torch.full(batch_shape, self.pad_token_id)
        label_rows = torch.full(batch_shape, IGNORE)
        attention_mask = torch.zeros(batch_shape, dtype=torch.int64)
        position_ids = torch.zeros(batch_shape, dtype=torch.int64)
        for row_index, (token_ids, labels_of_row) in enumerate(whole_sequences):
            first_column = 0 if self.padding_side == "right" else row_width - len(token_ids)
            used_columns = slice(first_column, first_column + len(token_ids))
            input_ids[row_index, used_columns] = torch.tensor(token_ids)
            label_rows[row_index, used_columns] = torch.tensor(labels_of_row)
            attention_mask[row_index, used_columns] = 1
            # Counted from the first token, so that padding on the left shifts no position.
            position_ids[row_index, used_columns] = torch.arange(len(token_ids))
        return Batch(input_ids, attention_mask, position_ids, Targets.from_labels(label_rows, attention_mask))


def _with_prompt(example: Row) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of each sequence, with its prompt before them."""
    first_sequence, *_ = sequence_parts = sequences(example)
    for token_ids, token_labels, prefix_length in sequence_parts:
        yield first_sequence.ids[:prefix_length] + token_ids, [IGNORE] * prefix_length + token_labels
