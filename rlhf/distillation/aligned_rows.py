"""Rows for two tokenizers: the same text for a student and its teacher, with the spans that align their tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.batch import IGNORE, Batch, Row
from rlhf.data.collate import Collator
from rlhf.data.columns import renamed
from rlhf.data.encoding import Reading, SftEncoder
from rlhf.data.errors import error_context
from rlhf.data.streams import name_of
from rlhf.data.tokenised_rows import Limits, TokenisedRow, truncate
from rlhf.data.tokenizing import TOKENISER_VERSION, map_rows, tokenizer_key
from rlhf.data.vocabulary import tokenizer_difference
from rlhf.distillation.alignment import Spans, align_answer, align_by_position, concatenate, first_tokens, token_pieces
from rlhf.distillation.config import Align

_VERSION = 1  # part of the cache key: raise it when the meaning of a row changes
_NEEDS_TEXT = "--align spans (--align uld compares without a common text)"
_FOR_THE_TEACHER = "for the teacher, whose template is its tokenizer's"
_STUDENT_SPANS = "span"  # column: the span of each scored token of the student, -1 for none
_TEACHER_SPANS = "teacher_span"  # column: the same of the teacher's tokens


class Alignment(NamedTuple):
    """What a batch is to a teacher with another tokenizer.

    Attributes:
        batch: the same sequences in the teacher's tokens, of which M are scored.
        spans: of the scored tokens of both batches, [N] and [M].
        partner: int64 [N], for the student's token at which a span begins, the teacher's token at which it begins; -1
            for all other tokens.
    """

    batch: Batch
    spans: Spans
    partner: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Alignment":
        return self._map_parts(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Alignment":
        return self._map_parts(lambda part: part.pin_memory())

    def _map_parts(self, change: Callable[[Any], Any]) -> "Alignment":
        spans = Spans(change(self.spans.student), change(self.spans.teacher), self.spans.total)
        return Alignment(change(self.batch), spans, change(self.partner))


def collate_alignment(examples: list[Row], collate: Collator, pad_token_id: int) -> Alignment:
    """Collate the teacher's side of a batch, as an entry of its extras.

    Args:
        examples: of :func:`tokenize_aligned`.
        collate: of the student's batch; the teacher's is laid out in the same way.
        pad_token_id: the teacher's.
    Returns:
        The teacher's batch and how its tokens are aligned with the student's.
    """
    rows = [{"input_ids": example["teacher_ids"], "labels": example["teacher_labels"]} for example in examples]
    teacher_batch = replace(collate, pad_token_id=pad_token_id, extras={})(rows)
    spans = concatenate([_spans_of(example) for example in examples])
    # Both models have read the same text before the first token of a span, so their distributions compare there.
    partner = torch.full_like(spans.student, -1)
    partner[first_tokens(spans.student, spans.total)] = first_tokens(spans.teacher, spans.total)
    return Alignment(teacher_batch, spans, partner)


def _spans_of(example: Row) -> Spans:
    student, teacher = (torch.tensor(example[column], dtype=torch.int64) for column in (_STUDENT_SPANS, _TEACHER_SPANS))
    total = int(student.max()) + 1 if len(student) else 0
    return Spans(student, teacher, total)


def tokenize_aligned(
    dataset: Dataset,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    align: Align,
    *,
    max_length: int,
    vocab_sizes: tuple[int, int],
    text_field: str = "text",
    drop_long_prompts: bool = False,
    num_proc: int | None = None,
    reading: Reading | None = None,
) -> Dataset:
    """Tokenise rows for the student and for the teacher, each in its own chat template.

    A span that loses a token to ``max_length``, on either side, is left out. So is one with the first token of a
    sequence, which nothing predicts.

    Args:
        dataset: rows of text.
        student: the student's tokenizer.
        teacher: the teacher's tokenizer.
        align: ``"spans"``, the smallest spans of text that both tokenizers can cut out; ``"uld"``, token i of an answer
            with token i, as far as the shorter answer goes.
        max_length: of either side, in its own tokens.
        vocab_sizes: of the student's and of the teacher's model.
        text_field: column of plain text.
        drop_long_prompts: leave out rows whose prompt leaves no room for an answer.
        num_proc: worker processes.
        reading: how rows are read.
    Returns:
        Rows as of :func:`rlhf.data.tokenize_sft`, with the columns ``teacher_ids``, ``teacher_labels``, ``span`` and
        ``teacher_span``.
    Raises:
        ValueError: the tokenizers are the same, or their tokens have no known bytes; rows of ids; two templates that
            write different answers; or what ``tokenize_sft`` raises. Names data set, row and remedy.
    """
    if tokenizer_difference(student, teacher) is None:
        raise ValueError("student and teacher have the same tokenizer: leave --align out, and all their tokens compare")
    tokenizers = (student, teacher)
    name = name_of(dataset)
    # Each tokenizer brings a chat template of its own.
    readings = [(reading or Reading()).for_tokenizer(tokenizer, text_field, dataset) for tokenizer in tokenizers]
    with error_context(name):
        names = renamed(dataset.column_names, readings[0].form)
        encoders = [SftEncoder.for_columns(names, one_reading) for one_reading in readings]
        column = encoders[0].column
        if column == "input_ids":
            raise ValueError("rows of 'input_ids' are in one tokenizer already, and --align needs their text")
    if align == "spans":
        with error_context(_NEEDS_TEXT):
            for tokenizer in tokenizers:
                token_pieces(tokenizer, [])  # raises for a kind of tokenizer that is not known
    sides = (
        _Side(student, encoders[0], Limits(max_length, vocab_sizes[0], drop_long_prompts)),
        _Side(teacher, encoders[1], Limits(max_length, vocab_sizes[1], drop_long_prompts)),
    )
    process = partial(_process, sides=sides, align=align, name=name)
    identities = [tokenizer_key(tokenizer) for tokenizer in tokenizers]
    versions = (_VERSION, TOKENISER_VERSION)
    options = (max_length, vocab_sizes, drop_long_prompts)
    key = ("aligned", versions, dataset._fingerprint, column, align, identities, name, options, readings[0])
    return map_rows(dataset, process, key, max_length, num_proc, readings[0])


@dataclass(frozen=True)
class _Side:
    """How one of the two models reads a row."""

    tokenizer: PreTrainedTokenizerBase
    encoder: SftEncoder
    limits: Limits

    def encode(self, row: Row) -> list[TokenisedRow]:
        return self.encoder.encode(row, self.tokenizer)

    def is_scored(self, position: int, label: int) -> bool:
        """Whether a token is scored after truncation; nothing predicts the first token of a row."""
        return label != IGNORE and 0 < position < self.limits.max_length


def _process(row: Row, index: int, *, sides: tuple[_Side, _Side], align: Align, name: str) -> list[TokenisedRow]:
    """The tokenised rows of one row of text."""
    student, teacher = sides
    with error_context(f"{name}, row {index + 1}"):
        student_rows = student.encode(row)
        # Messages say which side's template or length is at fault.
        with error_context(_FOR_THE_TEACHER):
            teacher_rows = teacher.encode(row)
        return [_aligned_row(encoded, sides, align) for encoded in zip(student_rows, teacher_rows, strict=True)]


def _aligned_row(encoded: tuple[TokenisedRow, TokenisedRow], sides: tuple[_Side, _Side], align: Align) -> TokenisedRow:
    """The student's row with the columns of the teacher's side."""
    student = truncate(encoded[0], sides[0].limits)
    with error_context(_FOR_THE_TEACHER):
        teacher = truncate(encoded[1], sides[1].limits)
    student_spans, teacher_spans = _scored_spans((encoded[0].columns, encoded[1].columns), sides, align)
    teacher_columns = {
        "teacher_ids": teacher.columns["input_ids"],
        "teacher_labels": teacher.columns["labels"],
        _STUDENT_SPANS: student_spans,
        _TEACHER_SPANS: teacher_spans,
    }
    # A row that either model cannot read is dropped for both.
    dropped_for_teacher = f"{teacher.dropped} for the teacher" if teacher.dropped else ""
    return replace(
        student,
        columns={**student.columns, **teacher_columns},
        truncated=student.truncated + teacher.truncated,
        dropped=student.dropped or dropped_for_teacher,
    )


def _scored_spans(encoded: tuple[Row, Row], sides: tuple[_Side, _Side], align: Align) -> list[list[int]]:
    """The span of each scored token of both sides, -1 for none."""
    spans = _spans_of_tokens(encoded, sides, align)
    # A span with a token that is not predicted or was cut off, on either side, is lost as a whole.
    lost_spans = {
        span
        for side, side_spans in zip(sides, spans, strict=True)
        for position, span in enumerate(side_spans)
        if not 0 < position < side.limits.max_length
    }
    # The rest is numbered without gaps: a batch counts spans by the largest number.
    remaining = sorted(set(spans[0]) - lost_spans - {-1})
    number_of = {span: number for number, span in enumerate(remaining)}
    scored_spans = []
    for side, row, side_spans in zip(sides, encoded, spans, strict=True):
        labelled = enumerate(zip(side_spans, row["labels"], strict=True))
        scored_spans.append(
            [number_of.get(span, -1) for position, (span, label) in labelled if side.is_scored(position, label)]
        )
    return scored_spans


def _spans_of_tokens(encoded: tuple[Row, Row], sides: tuple[_Side, _Side], align: Align) -> list[list[int]]:
    """The span of each token of both sides, -1 for none: answers are aligned one by one."""
    answers = [_answers(row, side.tokenizer) for row, side in zip(encoded, sides, strict=True)]
    # One template may score fewer answers, where it rewrites earlier turns: the last ones are common to both.
    count = min(len(side_answers) for side_answers in answers)
    answers = [side_answers[len(side_answers) - count :] for side_answers in answers]
    aligned = [_align_positions(encoded, sides, positions, align) for positions in zip(*answers, strict=True)]
    spans = concatenate(aligned)
    by_token = []
    for row, side_answers, side_spans in zip(encoded, answers, (spans.student, spans.teacher), strict=True):
        token_spans = [-1] * len(row["labels"])
        positions = (position for answer in side_answers for position in answer)
        for position, span in zip(positions, side_spans.tolist(), strict=True):
            token_spans[position] = span
        by_token.append(token_spans)
    return by_token


def _align_positions(
    encoded: tuple[Row, Row], sides: tuple[_Side, _Side], positions: Sequence[list[int]], align: Align
) -> Spans:
    """Align one answer, at ``positions`` of the two rows."""
    # Sorted probabilities know no text, so tokens are aligned by position alone.
    if align == "uld":
        student_positions, teacher_positions = positions
        return align_by_position(len(student_positions), len(teacher_positions))
    pieces = []
    with error_context(_NEEDS_TEXT):
        for row, side, answer in zip(encoded, sides, positions, strict=True):
            pieces.append(token_pieces(side.tokenizer, [row["input_ids"][position] for position in answer]))
        return align_answer(*pieces)


def _answers(encoded: Row, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Positions of each run of labelled tokens, without a BOS, which only one side may have."""
    # A run of labels is an answer: between two answers there are tokens of the user or of the template.
    position_runs: list[list[int]] = []
    previous = -2
    for position, label in enumerate(encoded["labels"]):
        is_bos = position == 0 and label == tokenizer.bos_token_id
        if label == IGNORE or is_bos:
            continue
        if position > previous + 1:
            position_runs.append([])
        position_runs[-1].append(position)
        previous = position
    return position_runs
