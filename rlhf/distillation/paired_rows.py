"""Rows for two tokenizers: the same text for a student and its teacher, and which scored tokens belong together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data import columns, tokenizing
from rlhf.data.batch import IGNORE, Batch
from rlhf.data.collate import Collator
from rlhf.data.encoding import Reading, Row, cut, encode_sft
from rlhf.data.tokenizing import identity, map_rows, name_of, prefixed
from rlhf.data.vocabulary import tokenizer_difference
from rlhf.distillation.alignment import Piece, Spans, _without_space, align, first_tokens, join, token_pieces

Align = Literal["uld", "spans"]
_VERSION = 1  # part of the cache key: raise it when the meaning of a row changes
_NEEDS_TEXT = "--align spans (--align uld compares without a common text)"
_OURS, _THEIRS = "span", "teacher_span"  # columns: the span of each scored token, -1 for none


@dataclass(frozen=True, eq=False)
class Paired:
    """What a batch is to a teacher with another tokenizer.

    ``batch`` is the teacher's, of the same sequences; ``spans`` are of both batches' targets, N and M; ``partner`` is
    int64 [N]: the first teacher's target of the span that begins at this target of the student, -1 where none begins.
    """

    batch: Batch
    spans: Spans
    partner: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Paired":
        student, teacher, partner = (
            t.to(device, non_blocking=non_blocking) for t in (self.spans.student, self.spans.teacher, self.partner)
        )
        return Paired(self.batch.to(device, non_blocking), Spans(student, teacher, self.spans.total), partner)


def collate_paired(examples: list[Row], collate: Collator, pad_token_id: int) -> Paired:
    """The entry ``"paired"`` of a batch's extras, from rows of :func:`tokenize_paired`.

    Args:
        collate: of the student's batch; the teacher's is laid out in the same way.
        pad_token_id: the teacher's.
    """
    rows = [{"input_ids": example["teacher_ids"], "labels": example["teacher_labels"]} for example in examples]
    theirs = replace(collate, pad_token_id=pad_token_id, extras={})(rows)
    spans = join([_spans(example[_OURS], example[_THEIRS]) for example in examples])
    partner = torch.full_like(spans.student, -1)
    partner[first_tokens(spans.student, spans.total)] = first_tokens(spans.teacher, spans.total)
    return Paired(theirs, spans, partner)


def tokenize_paired(
    dataset: Dataset,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    how: Align,
    *,
    max_length: int,
    vocab_sizes: tuple[int, int],
    text_field: str = "text",
    drop_long_prompts: bool = False,
    num_proc: int | None = None,
    reading: Reading | None = None,
) -> Dataset:
    """Rows as of :func:`tokenize_sft`, beside them the teacher's ``teacher_ids`` and ``teacher_labels``, each from its
    own chat template, and ``span`` and ``teacher_span``: of each scored token.

    ``max_length`` holds for either side's tokens. A span that loses a token to it is none; nor is one that has a
    sequence's first token, which nothing predicts.

    Args:
        how: ``"spans"``, the smallest stretches of text that both can cut out; ``"uld"``, token i of an answer beside
            token i, as far as the shorter goes.
        vocab_sizes: of the student and of the teacher.
    Raises:
        ValueError: the tokenizers are the same, or are of a kind whose bytes are not known; rows of ids; two templates
            that write different answers; or what :func:`tokenize_sft` raises. Names data set, row and remedy.
    """
    readings = [
        (reading or Reading()).for_tokenizer(tokenizer, text_field, dataset) for tokenizer in (student, teacher)
    ]
    if tokenizer_difference(student, teacher) is None:
        raise ValueError("student and teacher have the same tokenizer: leave --align out, and all their tokens compare")
    with prefixed(name_of(dataset)):
        column = columns.sft_column(dataset.column_names, readings[0].form)
        if column == "input_ids":
            raise ValueError("rows of 'input_ids' are in one tokenizer already, and --align needs their text")
    tokenizers = (student, teacher)
    if how == "spans":
        for tokenizer in tokenizers:
            with prefixed(_NEEDS_TEXT):
                token_pieces(tokenizer, [])
    process = partial(
        _process, column=column, tokenizers=tokenizers, how=how, name=name_of(dataset), max_length=max_length,
        vocab_sizes=vocab_sizes, drop=drop_long_prompts, readings=readings,
    )  # fmt: skip
    both = [identity(tokenizer) for tokenizer in tokenizers]
    versions, options = (_VERSION, tokenizing._VERSION), (max_length, vocab_sizes, drop_long_prompts)
    key = ("paired", versions, dataset._fingerprint, column, how, both, name_of(dataset), options, readings[0])
    return map_rows(dataset, process, key, max_length, num_proc, readings[0])


def align_answer(student: Sequence[Piece], teacher: Sequence[Piece]) -> Spans:
    """As :func:`align`, also where one template writes more around the answer than the other: white space, an empty
    thought. What only one side has, and a token that is partly of it, is in no span.

    Raises:
        ValueError: neither text holds the other, white space around them aside; says where they differ.
    Example:
        >>> align_answer([b"\\n", b"the", b" cat", None], [b"the ", b"cat", b" ", None])
        Spans(student=tensor([-1,  0,  0, -1]), teacher=tensor([ 0,  0, -1, -1]), total=1)
    """
    try:
        return align(student, teacher)
    except ValueError:
        sides = [_without_space(list(side)) if _text(side)[:1] == b" " else side for side in (student, teacher)]
        core = min((_text(side).strip() for side in sides), key=len)
        if any(core not in _text(side) for side in sides):
            raise
    places = [_places(side, _text(side).rfind(core)) for side in sides]
    ends = [{end for place in side for end in place if 0 <= end <= len(core)} for side in places]
    common = ends[0] & ends[1] or {0}
    low, high = min(common), max(common)
    inside = [[i for i, (start, end) in enumerate(side) if low <= start and end <= high] for side in places]
    pieces = [[side[i] for i in own] for side, own in zip(sides, inside, strict=True)]
    found = align(*pieces)
    whole = [torch.full((len(side),), -1) for side in places]
    for span, own, part in zip(whole, inside, (found.student, found.teacher), strict=True):
        span[own] = part
    return Spans(whole[0], whole[1], found.total)


def _text(pieces: Sequence[Piece]) -> bytes:
    return b"".join(piece or b"" for piece in pieces)


def _places(pieces: Sequence[Piece], offset: int) -> list[tuple[int, int]]:
    """Where each piece starts and ends, in bytes from ``offset``."""
    ends = [-offset]
    for piece in pieces:
        ends.append(ends[-1] + len(piece or b""))
    return list(pairwise(ends))


def _process(
    row: Row,
    index: int,
    *,
    column: str,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    how: Align,
    name: str,
    max_length: int,
    vocab_sizes: tuple[int, int],
    drop: bool,
    readings: Sequence[Reading],
) -> list[Row]:
    with prefixed(f"{name}, row {index + 1}"):
        ours_all = encode_sft(row, tokenizers[0], column, readings[0])
        with prefixed("for the teacher, whose template is its tokenizer's"):
            theirs_all = encode_sft(row, tokenizers[1], column, readings[1])
        return [
            _beside(ours, theirs, index, tokenizers, how, max_length, vocab_sizes, drop)
            for ours, theirs in zip(ours_all, theirs_all, strict=True)
        ]


def _beside(
    student: Row,
    teacher: Row,
    index: int,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
    how: Align,
    max_length: int,
    vocab_sizes: tuple[int, int],
    drop: bool,
) -> Row:
    whole = [student, teacher]
    ours = cut(dict(student), max_length, vocab_sizes[0], drop)
    with prefixed("for the teacher, whose template is its tokenizer's"):
        theirs = cut(dict(teacher), max_length, vocab_sizes[1], drop)
    spans = _align_row(whole, tokenizers, how)
    # A span with a token that is not scored, on either side, is none.
    lost = {s for side in spans for p, s in enumerate(side) if not 0 < p < max_length}
    number = {s: i for i, s in enumerate(sorted(set(spans[0]) - lost - {-1}))}
    kept = [
        [number.get(s, -1) for p, (s, label) in enumerate(zip(side, one["labels"], strict=True))
         if label != IGNORE and 0 < p < max_length]
        for side, one in zip(spans, whole, strict=True)
    ]  # fmt: skip
    return {
        **ours,
        "teacher_ids": theirs["input_ids"],
        "teacher_labels": theirs["labels"],
        _OURS: kept[0],
        _THEIRS: kept[1],
        "_cut": ours["_cut"] + theirs["_cut"],
        "_drop": ours["_drop"] or (theirs["_drop"] and theirs["_drop"] + " for the teacher"),
        "_bad": "",
        "_row": index,
    }


def _align_row(whole: list[Row], tokenizers: Sequence[PreTrainedTokenizerBase], how: Align) -> list[list[int]]:
    """The span of each token of both sides, -1 for none: answer by answer."""
    answers = [_answers(one, tokenizer) for one, tokenizer in zip(whole, tokenizers, strict=True)]
    # A template that rewrites earlier turns is scored on its last answer alone.
    count = min(map(len, answers))
    answers = [side[len(side) - count :] for side in answers]
    found = []
    for places in zip(*answers, strict=True):
        if how == "uld":
            found.append(_by_position(*map(len, places)))
            continue
        ids = [[one["input_ids"][p] for p in own] for one, own in zip(whole, places, strict=True)]
        with prefixed(_NEEDS_TEXT):
            found.append(align_answer(*map(token_pieces, tokenizers, ids)))
    spans = join(found)
    sides: list[list[int]] = []
    for one, own, span in zip(whole, answers, (spans.student, spans.teacher), strict=True):
        side = [-1] * len(one["labels"])
        for place, s in zip((p for places in own for p in places), span.tolist(), strict=True):
            side[place] = s
        sides.append(side)
    return sides


def _answers(encoded: Row, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Places of each run of labelled tokens, without a BOS, which only one side may have."""
    runs: list[list[int]] = []
    before = -2
    for place, label in enumerate(encoded["labels"]):
        if label == IGNORE or (place == 0 and label == tokenizer.bos_token_id):
            continue
        if place > before + 1:
            runs.append([])
        runs[-1].append(place)
        before = place
    return runs


def _by_position(student: int, teacher: int) -> Spans:
    shorter = min(student, teacher)
    ours, theirs = (torch.where(torch.arange(n) < shorter, torch.arange(n), -1) for n in (student, teacher))
    return Spans(ours, theirs, shorter)


def _spans(ours: Any, theirs: Any) -> Spans:
    student, teacher = (torch.tensor(side, dtype=torch.int64) for side in (ours, theirs))
    return Spans(student, teacher, int(student.max()) + 1 if len(student) else 0)
