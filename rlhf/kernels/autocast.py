"""The precision that autocast gives to what it does not cast by itself."""

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
