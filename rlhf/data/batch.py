"""What a model reads: rows of token ids, the targets that are scored, and every number that travels with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from rlhf.data.segments import Segments
from rlhf.logprobs import Targets

# The label that PyTorch's cross-entropy ignores by default, and that all of transformers uses.
IGNORE = -100
Layout = Literal["segments", "rows"]
Row = dict[str, Any]


class Movable(Protocol):
    """What can travel with a :class:`Batch`: a tensor, another batch, or any object with such a method."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Any: ...

    def pin_memory(self) -> Any: ...


# eq=False: a generated `==` would compare tensors, whose comparison is no single truth value.
@dataclass(frozen=True, eq=False)
class Batch:
    """The input of a policy, with N scored tokens in S sequences.

    Args:
        input_ids: int64 [B, T] in padded rows; [1, T] in segments, where nothing is padded.
        attention_mask: int64, as ``input_ids``: 1 for a token, 0 for padding.
        position_ids: int64, as ``input_ids``: from 0 in each sequence.
        targets: the scored tokens.
        segments: the spans of a flat row; None for padded rows.
        per_token: tensors [N, ...] in the order of ``targets``, by name, such as ``old_logps`` and ``advantages``.
        per_sequence: tensors [S, ...], by name, such as ``ref_logps`` (sums under the reference), ``margin`` (of a
            pair, at both of its sequences) and ``desirable``.
        extras: other inputs of a loss, by name: objects that can move to a device.
    Raises:
        ValueError: a tensor of ``per_token`` or ``per_sequence`` has another length.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    targets: Targets
    segments: Segments | None = None
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    per_sequence: Mapping[str, Tensor] = field(default_factory=dict)
    extras: Mapping[str, Movable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A tensor of another length may broadcast inside a loss and give a wrong value without an error.
        _check_lengths("per_token", self.per_token, len(self.targets), "scored tokens")
        _check_lengths("per_sequence", self.per_sequence, self.targets.num_sequences, "sequences")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch with all its tensors on ``device``."""
        return self._map_parts(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch in pinned memory, from which a GPU copies while the host goes on.

        PyTorch's data loader calls this with ``dataloader_pin_memory``.
        """
        return self._map_parts(lambda part: part.pin_memory())

    def _map_parts(self, change: Callable[[Any], Any]) -> Self:
        """The same batch with each of its tensors, and all else that can move, changed."""

        def changed(parts: Mapping[str, Any]) -> dict[str, Any]:
            return {name: change(part) for name, part in parts.items()}

        inputs = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "position_ids")}
        return replace(
            self,
            **changed(inputs),
            targets=change(self.targets),
            segments=None if self.segments is None else change(self.segments),
            per_token=changed(self.per_token),
            per_sequence=changed(self.per_sequence),
            extras=changed(self.extras),
        )

    def num_tokens(self) -> Tensor:
        """Tokens of all sequences, each with its prompt: the same number in any layout."""
        if self.segments is None:
            return self.attention_mask.sum()
        num_tokens = sum(span.length + span.prefix for span in self.segments.spans)
        # Filled on the device: copying a number from the host would wait for the device.
        return self.input_ids.new_full((), num_tokens)

    def last(self) -> Tensor:
        """Row of the flattened hidden states that holds the last token of each sequence: int64 [S].

        Read off positions, never off ids: right where the padding is a token that occurs in the text.
        """
        if self.segments is None:
            num_rows, row_width = self.attention_mask.shape
            # `argmax` finds the first 1 from the right; with padding on the left that is at 0.
            padding_on_the_right = self.attention_mask.flip(1).argmax(1)
            sequence_ends = torch.arange(1, num_rows + 1, device=padding_on_the_right.device) * row_width
            return sequence_ends - 1 - padding_on_the_right
        return self.segments.last_rows()

    def inputs(self) -> dict[str, Any]:
        """The arguments of a causal LM's forward."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        if self.segments is None:
            return inputs | {"attention_mask": self.attention_mask}
        # A mask of four dimensions is passed on as it is: without it, transformers would build one of T x T. As it is
        # empty, an attention that would use it (the model's own, without segments) fails instead of seeing all.
        return inputs | {"attention_mask": self.attention_mask.new_zeros(1, 1, 0, 0), "segments": self.segments}


def _check_lengths(name: str, columns: Mapping[str, Tensor], expected: int, counted: str) -> None:
    for column_name, tensor in columns.items():
        if len(tensor) != expected:
            raise ValueError(f"{name}[{column_name!r}] has {len(tensor)} values, the batch has {expected} {counted}")


class Sequence(NamedTuple):
    """One sequence of an example: ``ids`` follow the first ``prefix`` ids of the example's first sequence."""

    ids: list[int]
    labels: list[int]
    prefix: int = 0


def sequences(row: Row) -> list[Sequence]:
    """The sequences of a tokenised row.

    Args:
        row: ``input_ids`` and ``labels`` of one sequence; or ``prompt_ids`` with ``chosen_ids`` and ``rejected_ids``,
            or with a group of ``completions`` (and their ``labels``, where not all of their tokens are scored).
    Returns:
        One sequence; or chosen, then rejected; or the group in its order. The first one holds the prompt.
    """
    if "prompt_ids" not in row:
        return [Sequence(row["input_ids"], row["labels"])]
    prompt_ids = row["prompt_ids"]
    completions: list[list[int]] = (
        row["completions"] if "completions" in row else [row["chosen_ids"], row["rejected_ids"]]
    )
    # Without labels, every token of an answer is scored: its ids are its labels.
    first, *other_answers = zip(completions, row.get("labels", completions), strict=True)
    first_ids, first_labels = first
    # Only the first sequence holds the prompt, so that a flat row computes it once for all answers.
    first_sequence = Sequence(prompt_ids + first_ids, [IGNORE] * len(prompt_ids) + first_labels)
    return [
        first_sequence,
        *(Sequence(answer_ids, answer_labels, len(prompt_ids)) for answer_ids, answer_labels in other_answers),
    ]
