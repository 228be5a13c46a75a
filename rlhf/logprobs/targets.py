"""The scored tokens: the one contract for shifting and ``ignore_index``."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


# Compared by identity: a comparison of tensors has no single truth value.
@dataclass(frozen=True, eq=False)
class Targets:
    """Row ``source`` of the flattened hidden states predicts ``token`` of ``sequence``.

    Built once, in the collator; nothing downstream shifts again. Everything kept for a token is a flat [N] vector
    aligned with it, everything kept for a sequence is [S].

    Args:
        source: int64 [N], row of ``hidden.view(-1, H)``. The same row may predict several tokens (shared prompts).
        token: int64 [N], the token that is predicted.
        sequence: int64 [N] in [0, S), the completion that the token belongs to.
        num_sequences: S. Sequences without a scored token count too, so give it where there may be some;
            by default the largest sequence + 1.
    Raises:
        ValueError: the three vectors differ in shape or are no flat integer vectors.
    """

    source: Tensor
    token: Tensor
    sequence: Tensor
    num_sequences: int = -1

    def __post_init__(self) -> None:
        for name in ("source", "token", "sequence"):
            vector = getattr(self, name)
            if vector.dim() != 1 or vector.dtype != torch.int64 or vector.shape != self.source.shape:
                raise ValueError(
                    f"Targets.{name} must be int64 [{self.source.numel()}], got {vector.dtype} {tuple(vector.shape)}"
                )
        if self.num_sequences < 0:
            # The dataclass is frozen, for everybody but its own constructor.
            # Reading the largest sequence makes the host wait for a GPU: collators give the number.
            object.__setattr__(self, "num_sequences", int(self.sequence.max()) + 1 if len(self) else 0)

    def __len__(self) -> int:
        return self.source.numel()

    @classmethod
    def from_labels(cls, labels: Tensor, attention_mask: Tensor | None = None, ignore_index: int = -100) -> "Targets":
        """Every label that is not ignored, predicted from the position before it.

        Args:
            labels: int64 [B, T], aligned with ``input_ids`` (unshifted), as in Hugging Face.
            attention_mask: [B, T], non-zero where there is a token. Give it with left padding: without it, the
                first real token of a row would be predicted from a pad.
            ignore_index: label that is not scored.
        Returns:
            Sequence b is row b. A row's first token has nothing before it and is never scored.
        Raises:
            ValueError: labels or mask are no [B, T].
        """
        _check_grid("labels", labels)
        is_scored = labels != ignore_index
        if attention_mask is not None:
            _check_grid("attention_mask", attention_mask, labels)
            is_token = attention_mask.bool()
            is_scored = is_scored & is_token
            # Behind padding on the left, the position before the first token is padding.
            is_scored[:, 1:] &= is_token[:, :-1]
        # Flattened, the position before it would be the last one of the row above.
        is_scored[:, 0] = False
        row, column = is_scored.nonzero(as_tuple=True)
        source = row * labels.size(1) + column - 1
        return cls(source, labels[row, column], row, num_sequences=labels.size(0))

    @classmethod
    def from_mask(cls, input_ids: Tensor, mask: Tensor, attention_mask: Tensor | None = None) -> "Targets":
        """The tokens where a mask is True, each predicted from the position before it.

        Args:
            input_ids: int64 [B, T].
            mask: [B, T], True for a scored token.
            attention_mask: as in :meth:`from_labels`.
        Returns:
            Sequence b is row b.
        Raises:
            ValueError: the mask has another shape than the ids.
        """
        _check_grid("mask", mask, input_ids)
        return cls.from_labels(torch.where(mask.bool(), input_ids, -100), attention_mask)

    @classmethod
    def from_lengths(
        cls,
        input_ids: Tensor,
        prompt_lengths: Tensor,
        completion_lengths: Tensor,
        padding_side: Literal["left", "right"] = "right",
    ) -> "Targets":
        """The completion of each row ``[prompt, completion]``.

        Args:
            input_ids: [B, T].
            prompt_lengths: int [B], tokens.
            completion_lengths: int [B], tokens.
            padding_side: where rows are padded.
        Returns:
            The targets.
        Raises:
            ValueError: a row is shorter than its prompt and completion.
        """
        _check_grid("input_ids", input_ids)
        width = input_ids.size(1)
        lengths = prompt_lengths + completion_lengths
        exceeds_width = lengths > width
        if bool(exceeds_width.any()):
            row = int(exceeds_width.nonzero()[0])
            raise ValueError(f"row {row} has prompt + completion = {int(lengths[row])} tokens, input_ids only {width}")
        positions = torch.arange(width, device=input_ids.device)[None]
        starts = width - lengths if padding_side == "left" else torch.zeros_like(lengths)
        row_start, row_end = starts[:, None], (starts + lengths)[:, None]
        # The ends are given by lengths and not by the pad's id, which an answer may contain.
        attention_mask = (positions >= row_start) & (positions < row_end)
        completion_mask = attention_mask & (positions >= row_start + prompt_lengths[:, None])
        return cls.from_mask(input_ids, completion_mask, attention_mask)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Targets":
        """The same targets on another device."""
        return self._map_tensors(lambda vector: vector.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Targets":
        """The same targets in pinned memory."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        source, token, sequence = (change(vector) for vector in (self.source, self.token, self.sequence))
        return replace(self, source=source, token=token, sequence=sequence)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` [N] over each sequence: [S], 0 for a sequence without a scored token."""
        # By sums into zeros, so that a sequence without a scored token has its row, too.
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence, values)

    def counts(self) -> Tensor:
        """Scored tokens of each sequence: int64 [S]."""
        # Not bincount, which makes the host wait for a GPU.
        return self.sequence.new_zeros(self.num_sequences).index_add(0, self.sequence, torch.ones_like(self.sequence))


def _check_grid(name: str, value: Tensor, like: Tensor | None = None) -> None:
    if value.dim() != 2 or (like is not None and value.shape != like.shape):
        expected_shape = "[batch, seq]" if like is None else f"{tuple(like.shape)}"
        raise ValueError(f"{name} must be {expected_shape}, got {tuple(value.shape)}")
