"""What older transformers call otherwise, or do not do: the one place that asks."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_utils

_SLICES_BY_MASK = hasattr(modeling_utils, "slice_logits_to_keep")


def kept_logits(model: nn.Module, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """The model's own logits where the bool ``mask`` [B, T] is True: [kept, V]; older models compute all of them."""
    if _SLICES_BY_MASK:
        return model(**inputs, use_cache=False, logits_to_keep=mask).logits
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[mask.to(torch.bool)]


def activation_checkpointing(args: Any) -> tuple[bool, dict[str, Any]]:
    """Whether layers are computed again in the backward pass, and how; once ``gradient_checkpointing``."""
    name = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else "gradient_checkpointing"
    return bool(getattr(args, name)), getattr(args, f"{name}_kwargs") or {}
