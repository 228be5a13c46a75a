"""Token rows to a batch: padded, with explicit positions and the targets that everything downstream follows."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.logprobs import Targets

IGNORE = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """What the policy reads. ``input_ids``, ``attention_mask``, ``position_ids`` are int64 [B, T]."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    targets: Targets

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        tensors = {name: t.to(device, non_blocking=non_blocking) for name, t in self.inputs().items()}
        return Batch(targets=self.targets.to(device, non_blocking), **tensors)

    def inputs(self) -> dict[str, Any]:
        """What a causal LM's forward takes."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }


@dataclass(frozen=True)
class Collator:
    """Lay out examples in padded rows.

    An example with k completions becomes sequences ``k * i`` … ``k * i + k - 1``: k = 1 for supervised fine-tuning,
    k = 2 for a preference pair (chosen, then rejected). ``pad_token_id`` may be any id, EOS too: what counts is
    decided by lengths, never by comparing ids.
    """

    pad_token_id: int = 0
    padding_side: Literal["left", "right"] = "right"

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        sequences = [sequence for row in rows for sequence in _sequences(row)]
        width = max(len(ids) for ids, _ in sequences)
        shape = (len(sequences), width)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORE)
        attention_mask, position_ids = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        for index, (ids, own_labels) in enumerate(sequences):
            used = slice(0, len(ids)) if self.padding_side == "right" else slice(width - len(ids), width)
            input_ids[index, used] = torch.tensor(ids)
            labels[index, used] = torch.tensor(own_labels)
            attention_mask[index, used] = 1
            position_ids[index, used] = torch.arange(len(ids))
        return Batch(input_ids, attention_mask, position_ids, Targets.from_labels(labels, attention_mask))


def _sequences(row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    if "prompt_ids" not in row:
        return [(row["input_ids"], row["labels"])]
    prompt = row["prompt_ids"]
    return [(prompt + ids, [IGNORE] * len(prompt) + ids) for ids in (row["chosen_ids"], row["rejected_ids"])]
