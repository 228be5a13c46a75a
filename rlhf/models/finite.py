"""Weights that are no numbers: found when a model is loaded, rather than as a loss of NaN later."""

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

_MAX_NAMED = 3
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_finite(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Refuse a model whose weights hold NaN or infinity.

    Args:
        model: as it was loaded. Weights that are stored in whole numbers, or without values yet, are passed over.
        name: of the model, for the message.

    Returns:
        The model.

    Raises:
        ValueError: Names the first such weights.
    """
    bad_names = [weight_name for weight_name, weight in model.named_parameters() if not _is_finite(weight)]
    if not bad_names:
        return model
    more = f" and {len(bad_names) - _MAX_NAMED} more" if len(bad_names) > _MAX_NAMED else ""
    raise ValueError(
        f"{name}: NaN or infinity in the weights {', '.join(bad_names[:_MAX_NAMED])}{more}; take another checkpoint of "
        "the run that saved them, or download them again"
    )


def _is_finite(weight: Tensor) -> bool:
    # A sharded weight is looked at by each process in part.
    values = weight.to_local() if isinstance(weight, DTensor) else weight.detach()
    # torch finds no largest value among numbers of 8 bits.
    if values.is_meta or not values.numel() or values.dtype not in _DTYPES:
        return True
    # Both are NaN if any value is. `isfinite` takes 60 times as long, as it writes a table.
    smallest, largest = torch.aminmax(values)
    return math.isfinite(smallest) and math.isfinite(largest)
