"""Differences between versions of transformers: the one place that asks."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_utils

_SLICES_BY_MASK = hasattr(modeling_utils, "slice_logits_to_keep")


def kept_logits(model: nn.Module, inputs: dict[str, Any], mask: Tensor) -> Tensor:
    """The model's own logits at some positions; older models compute all of them.

    Args:
        model: a transformers causal LM.
        inputs: the arguments of its forward.
        mask: bool [B, T], True for a position that is wanted.
    Returns:
        [positions, V], or [B, T, V] from a model that ignores the mask.
    """
    if _SLICES_BY_MASK:
        return model(**inputs, use_cache=False, logits_to_keep=mask).logits
    # Older versions know positions that are the same in each row only.
    logits: Tensor = model(**inputs, use_cache=False).logits
    # Indexed here, so that callers get the same rows from every version.
    return logits[mask.to(torch.bool)]
