"""Our losses inside other people's trainers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def as_compute_loss(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """A loss in the form that ``transformers.Trainer(compute_loss_func=...)`` calls.

    Args:
        loss: called as ``loss(logits, labels, **options)``; it must take ``reduction``.
        options: hyper-parameters, fixed.
    Returns:
        ``compute(outputs, labels, num_items_in_batch=None)``. Given the number of items, the summed loss is divided by
        it, so that accumulated micro-batches give the gradient of the whole batch; without it, the mean is taken.
    Example:
        >>> import torch
        >>> from rlhf.losses import causal_lm_loss
        >>> compute = as_compute_loss(causal_lm_loss, z_loss=1e-4)
        >>> outputs = {"logits": torch.zeros(1, 3, 4)}
        >>> compute(outputs, torch.tensor([[0, 2, 1]]), num_items_in_batch=4)    # 2 tokens here, 4 in the step
        tensor(0.6932)
    """

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        logits = outputs["logits"]
        if num_items_in_batch is None:
            return loss(logits, labels, **options)
        return loss(logits, labels, reduction="sum", **options) / num_items_in_batch

    return compute
