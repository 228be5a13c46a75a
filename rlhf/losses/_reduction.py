"""The one reducer under every loss, and the precision rule."""

from typing import Literal

import torch
from torch import Tensor

from rlhf.losses._checks import check_same_shape

Reduction = Literal["mean", "sum", "none"]


def upcast(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def reduce(
    values: Tensor, reduction: Reduction = "mean", weight: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Reduce per-element losses.

    Args:
        values: any shape.
        reduction: ``"mean"`` is the weighted mean over what counts, ``sum(w * x) / sum(w)``; ``"sum"`` is
            ``sum(w * x)``; ``"none"`` keeps the shape, with 0 where the mask is False.
        weight: same shape as ``values``, non-negative.
        mask: same shape, True counts. What it hides may be NaN or infinite without harm.
    Returns:
        Scalar, or ``values``'s shape for ``"none"``. Nothing counts: a zero that can be differentiated.
    """
    check_same_shape(values=values, weight=weight, mask=mask)
    if mask is not None:
        values = torch.where(mask.bool(), values, 0.0)
    if weight is not None:
        weight = weight.to(values.dtype) if mask is None else torch.where(mask.bool(), weight.to(values.dtype), 0.0)
        values = values * weight
    match reduction:
        case "none":
            return values
        case "sum":
            return values.sum()
        case "mean":
            counted = weight if weight is not None else mask
            total = values.new_tensor(values.numel()) if counted is None else counted.sum().to(values.dtype)
            # Nothing counts: 0 / 1 keeps the graph, where 0 / 0 would be NaN.
            return values.sum() / torch.where(total == 0, 1.0, total)
    raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
