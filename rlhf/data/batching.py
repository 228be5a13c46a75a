"""Token rows to a batch: laid out without padding or in padded rows, with the targets that everything follows."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf.logprobs import Targets, TopK

IGNORE = -100
TEACHER_ROW = "teacher_row"  # column: which row of the teacher's file a row is
Layout = Literal["segments", "rows"]


class Span(NamedTuple):
    """``length`` tokens of a flat row: each sees those before it in its span, and ``prefix`` tokens of another.

    ``parent`` is the index of the span whose first ``prefix`` tokens they are (a branch sees the prompt that its
    group's first span begins with).
    """

    length: int
    parent: int = -1
    prefix: int = 0


@dataclass(frozen=True, eq=False)
class Segments:
    """What an attention function must know of a flat row: its spans, in order, without gaps."""

    spans: tuple[Span, ...]
    plans: dict[Any, Any] = field(default_factory=dict)  # masks and the like: made by the first layer, used by all


@dataclass(frozen=True, eq=False)
class Batch:
    """What the policy reads: int64 [B, T] in padded rows, [1, T] in segments, where nothing is padded.

    ``ref_logps`` [S] are the reference's sums for each sequence, where they were computed before; ``margin`` is float32
    [pairs], how far apart the rewards of each pair should be, where the data says so; ``desirable`` is bool [S], which
    answers are good; ``mismatched`` holds the same prompts with the answers to others; ``teacher`` is what was kept of
    a teacher for each of the targets, ``teacher_logps`` [N] what it says of the targets themselves; ``paired`` is the
    same text for a teacher with another tokenizer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    targets: Targets
    segments: Segments | None = None
    ref_logps: Tensor | None = None
    margin: Tensor | None = None
    desirable: Tensor | None = None
    mismatched: "Batch | None" = None
    teacher: TopK | None = None
    teacher_logps: Tensor | None = None
    paired: Any = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        names = (
            "input_ids",
            "attention_mask",
            "position_ids",
            "ref_logps",
            "margin",
            "desirable",
            "teacher",
            "teacher_logps",
        )
        held: dict[str, Any] = {
            name: tensor for name in (*names, "paired", "mismatched") if (tensor := getattr(self, name)) is not None
        }
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in held.items()}
        return replace(self, targets=self.targets.to(device, non_blocking), **moved)

    def num_tokens(self) -> Tensor:
        """Tokens of all sequences, each with its prompt: the same in any layout."""
        if self.segments is None:
            return self.attention_mask.sum()
        count = sum(span.length + span.prefix for span in self.segments.spans)
        return self.input_ids.new_full((), count)  # written on the device: a copy to it would wait for it

    def last(self) -> Tensor:
        """Row of the flattened hidden states that holds the last token of each sequence: int64 [S].

        Read off positions, never off ids: right where the padding is a token that occurs in the text.
        """
        if self.segments is None:
            rows, width = self.attention_mask.shape
            padding = self.attention_mask.flip(1).argmax(1)  # on the right
            return torch.arange(1, rows + 1, device=padding.device) * width - 1 - padding
        ends = torch.tensor([span.length for span in self.segments.spans]).cumsum(0) - 1
        return ends.to(self.input_ids.device)

    def inputs(self) -> dict[str, Any]:
        """What a causal LM's forward takes."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        if self.segments is None:
            return inputs | {"attention_mask": self.attention_mask}
        # A mask of four dimensions is passed on as it is: without it, transformers would build one of T x T. As it is
        # empty, an attention that would use it (the model's own, without segments) fails instead of seeing all.
        return inputs | {"attention_mask": self.attention_mask.new_zeros(1, 1, 0, 0), "segments": self.segments}


class Sequence(NamedTuple):
    """One sequence of an example: ``ids`` follow the first ``prefix`` ids of the example's first sequence."""

    ids: list[int]
    labels: list[int]
    prefix: int = 0


def sequences(row: dict[str, Any]) -> list[Sequence]:
    """The sequences of a tokenised row: one for supervised fine-tuning; chosen, then rejected for a pair; a group's
    ``completions`` (with ``labels`` of their own, where not all of their tokens are scored)."""
    if "prompt_ids" not in row:
        return [Sequence(row["input_ids"], row["labels"])]
    prompt = row["prompt_ids"]
    completions = row["completions"] if "completions" in row else [row["chosen_ids"], row["rejected_ids"]]
    first, *others = zip(completions, row.get("labels", completions), strict=True)
    whole = Sequence(prompt + first[0], [IGNORE] * len(prompt) + first[1])
    return [whole, *(Sequence(ids, labels, len(prompt)) for ids, labels in others)]


@dataclass(frozen=True)
class Collator:
    """Lay out examples; one with k completions becomes sequences ``k * i`` … ``k * i + k - 1``.

    Args:
        layout: ``"segments"`` puts all tokens in one row without padding, and a prompt once for all its completions;
            the model needs :func:`rlhf.models.use_segments`. ``"rows"`` pads, which any model takes.
        pad_token_id: any id, EOS too: what counts is decided by lengths, never by comparing ids.
        padding_side: of ``"rows"``.
        teacher: what was kept of a teacher, for the rows that say which of its rows they are.
    """

    pad_token_id: int = 0
    padding_side: Literal["left", "right"] = "right"
    layout: Layout = "rows"
    teacher: Any = None

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        examples = [example for row in rows for example in row.get("examples", [row])]
        batch = self._lay_out(examples)
        if "margin" in examples[0]:
            batch = replace(batch, margin=torch.tensor([float(example["margin"]) for example in examples]))
        if self.teacher is not None and TEACHER_ROW in examples[0]:
            batch = replace(batch, teacher=self.teacher.take([example[TEACHER_ROW] for example in examples]))
        if "desirable" in examples[0]:
            batch = replace(batch, desirable=torch.tensor([bool(example["desirable"]) for example in examples]))
        if "mismatched" in examples[0]:
            others = [
                {"prompt_ids": e["prompt_ids"], "completions": e["mismatched"], "labels": e["mismatched_labels"]}
                for e in examples
            ]
            mismatched = _with_ref_logps(self._lay_out(others), examples, ["ref_mismatched_logps"])
            batch = replace(batch, mismatched=mismatched)
        names = ["ref_logps"] if "desirable" in examples[0] else ["ref_chosen_logps", "ref_rejected_logps"]
        return _with_ref_logps(batch, examples, names)

    def _lay_out(self, examples: list[dict[str, Any]]) -> Batch:
        return self._flat(examples) if self.layout == "segments" else self._padded(examples)

    def _flat(self, examples: list[dict[str, Any]]) -> Batch:
        spans: list[Span] = []
        ids: list[int] = []
        positions: list[Tensor] = []
        sources: list[Tensor] = []
        tokens: list[Tensor] = []
        owners: list[Tensor] = []
        start = 0
        for example in examples:
            first, first_start = len(spans), start
            for sequence in sequences(example):
                prefix, length = sequence.prefix, len(sequence.ids)
                spans.append(Span(length, first, prefix) if prefix else Span(length))
                labels = torch.tensor(sequence.labels, dtype=torch.int64)  # empty too
                scored = (labels != IGNORE).nonzero().squeeze(1)
                source = start + scored - 1
                if prefix:  # a branch's first token is predicted by the prompt's last
                    source[scored == 0] = first_start + prefix - 1
                else:  # nothing comes before the first token of all
                    scored, source = scored[scored > 0], source[scored > 0]
                ids += sequence.ids
                positions.append(torch.arange(prefix, prefix + length))
                sources.append(source)
                tokens.append(labels[scored])
                owners.append(torch.full_like(scored, len(owners)))
                start += length
        targets = Targets(torch.cat(sources), torch.cat(tokens), torch.cat(owners), len(owners))
        row = torch.tensor(ids)[None]
        return Batch(row, torch.ones_like(row), torch.cat(positions)[None], targets, Segments(tuple(spans)))

    def _padded(self, examples: list[dict[str, Any]]) -> Batch:
        whole = [pair for example in examples for pair in _whole(example)]
        width = max(len(ids) for ids, _ in whole)
        shape = (len(whole), width)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORE)
        attention_mask, position_ids = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        for index, (ids, own_labels) in enumerate(whole):
            used = slice(0, len(ids)) if self.padding_side == "right" else slice(width - len(ids), width)
            input_ids[index, used] = torch.tensor(ids)
            labels[index, used] = torch.tensor(own_labels)
            attention_mask[index, used] = 1
            position_ids[index, used] = torch.arange(len(ids))
        return Batch(input_ids, attention_mask, position_ids, Targets.from_labels(labels, attention_mask))


def _with_ref_logps(batch: Batch, examples: list[dict[str, Any]], columns: list[str]) -> Batch:
    if columns[0] not in examples[0]:
        return batch
    known = [[example[column] for column in columns] for example in examples]
    return replace(batch, ref_logps=torch.tensor(known).view(-1))


def _whole(example: dict[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """Each sequence with its prompt."""
    first, *_ = found = sequences(example)
    for ids, labels, prefix in found:
        yield first.ids[:prefix] + ids, [IGNORE] * prefix + labels
