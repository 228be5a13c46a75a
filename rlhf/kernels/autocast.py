"""Precision where autocast casts nothing by itself, and where it must not cast."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch


def dtype_under_autocast(dtype: torch.dtype, device: str) -> torch.dtype:
    """The type in which autocast would multiply; without autocast, the same type.

    Args:
        dtype: of a tensor.
        device: its device type, such as ``"cuda"``.
    Returns:
        The type to cast to.
    """
    # Autocast leaves float64 alone, and some devices have none, such as "meta" where a step is only counted.
    if dtype == torch.float64 or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


Backward = TypeVar("Backward", bound=Callable[..., Any])


def without_autocast(backward: Backward) -> Backward:
    """Decorate the backward pass of a function, so that it computes in the types of its forward pass.

    Some loops call ``loss.backward()`` under autocast. The backward pass of torch's own operators ignores it; without
    this, that of a function made of them would multiply in half precision.

    Args:
        backward: of a :class:`torch.autograd.Function`.
    Returns:
        The same function, with autocast off.
    """

    @wraps(backward)
    def computes(ctx: Any, *grads: Any) -> Any:
        device = next((grad.device.type for grad in grads if grad is not None), None)
        if device is None:  # nothing that a loss reads
            return backward(ctx, *grads)
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return cast(Backward, computes)
