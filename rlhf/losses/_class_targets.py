"""Checks of class indices, and of the scores that they point into."""

from typing import Any

import torch
from torch import Tensor

from rlhf.losses._checks import (
    check_floating,
    check_tensor,
    checking,
    element,
    first_rows,
    first_true,
    is_cheap_to_read,
)

# What half precision may add to a logarithm or to a sum of probabilities.
ROUNDING = 1e-2


def check_labels(name: str, labels: Tensor, classes: int, ignore_index: int, kind: str = "classes") -> None:
    """Raise unless every label is an index into ``classes`` or ``ignore_index``.

    Args:
        name: of the argument.
        labels: any shape.
        classes: the number of classes.
        ignore_index: one more label that is allowed.
        kind: what the error calls them.
    """
    check_tensor(name, labels)
    if labels.is_floating_point() or labels.dtype is torch.bool:
        raise ValueError(_not_integers(name, labels))
    if not labels.numel() or not is_cheap_to_read(labels):
        return
    # On CUDA such a label is a device-side assert without its position, after which the process cannot go on.
    is_wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if is_wrong.any():
        position = first_true(is_wrong)
        scored = labels[labels != ignore_index]
        is_counted_from_1 = scored.min() == 1 and scored.max() == classes
        remedy = f"fix the label, or set it to ignore_index ({ignore_index})"
        if is_counted_from_1 and kind == "classes":
            remedy = f"classes are counted from 0, so pass {name} - 1"
        where = f"outside the {kind} [0, {classes})"
        raise ValueError(f"{element(name, position)} is {int(labels[position])}, {where}: {remedy}")


def _not_integers(name: str, labels: Tensor) -> str:
    rule = f"{name} must hold class indices (integers)"
    if labels.is_floating_point() and is_cheap_to_read(labels):
        is_fraction = labels.isfinite() & (labels != labels.round())
        if is_fraction.any():
            position = first_true(is_fraction)
            value = f"{element(name, position)} is {float(labels[position]):.4g}"
            return f"{rule}, and {value}: for continuous targets use mse_loss"
    return f"{rule}, got {labels.dtype} of shape {tuple(labels.shape)}: pass {name}.long()"


def has_soft_targets(scores_name: str, scores: Any, name: str, targets: Any, soft_allowed: bool) -> bool:
    """Check the shapes and types of scores of classes and their targets.

    Args:
        scores_name: argument that holds ``scores``.
        scores: [..., C].
        name: argument that holds ``targets``.
        targets: [...] integer indices, or [..., C] probabilities.
        soft_allowed: whether the loss takes probabilities.
    Returns:
        Whether the targets are probabilities.
    Raises:
        ValueError: they do not belong together.
    """
    check_floating(scores_name, scores)
    check_tensor(name, targets)
    # Nearly all calls end here.
    if scores.dim() and scores.shape[-1] > 1 and targets.shape == scores.shape[:-1]:
        return False
    _check_class_dimension(scores_name, scores, targets)
    shape, scores_shape = tuple(targets.shape), tuple(scores.shape)
    if shape == scores_shape:
        if not soft_allowed:
            raise ValueError(f"{name} must be class indices, got one-hot rows or probabilities: pass {name}.argmax(-1)")
        if not targets.is_floating_point():
            raise ValueError(
                f"{name} of shape {shape} are {targets.dtype}, and look like one-hot rows: "
                f"pass {name}.argmax(-1) as class indices, or {name}.float() as probabilities"
            )
        return True
    probabilities = f" or probabilities of shape {scores_shape}" if soft_allowed else ""
    raise ValueError(
        f"{name} must be indices of shape {scores_shape[:-1]}{probabilities}, to go with {scores_name} "
        f"{scores_shape}; got {shape}{_shape_hint(scores_name, scores_shape, name, shape)}"
    )


def _check_class_dimension(name: str, scores: Tensor, targets: Tensor) -> None:
    shape = tuple(scores.shape)
    advice = "for two classes and one logit use bce_with_logits_loss"
    if scores.dim() and shape[-1] == 1:
        raise ValueError(f"{name} of shape {shape} have one class, so that the loss is always 0: {advice}")
    # One row of soft targets has this shape too, but is floating point.
    has_no_classes = scores.dim() == 1 and targets.shape == scores.shape and not targets.is_floating_point()
    if not scores.dim() or has_no_classes:
        raise ValueError(f"{name} of shape {shape} have no dimension of classes: {advice}")


def _shape_hint(scores_name: str, scores_shape: tuple[int, ...], name: str, shape: tuple[int, ...]) -> str:
    if shape == (*scores_shape[:-1], 1):
        return f": pass {name}.squeeze(-1)"
    # As torch.nn.functional.cross_entropy has them.
    if len(scores_shape) > 2 and shape == scores_shape[:1] + scores_shape[2:]:
        return f": the classes must be the last dimension: pass {scores_name}.movedim(1, -1)"
    return ""


def check_class_weights(weights: Tensor | None, classes: int) -> None:
    """Raise unless there is one weight for each class."""
    if weights is None:
        return
    check_tensor("class_weights", weights)
    if tuple(weights.shape) != (classes,):
        raise ValueError(
            f"class_weights must have a value for each of {classes} classes, got shape {tuple(weights.shape)}"
        )


def check_log_probs(log_probs: Tensor, mask: Tensor | None) -> None:
    """Raise for values above 0, which are no log-probabilities: on a CPU where the first rows have one.

    Args:
        log_probs: [..., C].
        mask: [...], True where a row counts.
    Raises:
        ValueError: a value of a row that counts is above 0.
    """
    if not log_probs.numel() or not is_cheap_to_read(log_probs):
        return
    # Reading all of them would cost as much as the loss. Rounding of half precision is no mistake.
    if not checking() and float(first_rows(log_probs).max()) <= ROUNDING:
        return
    is_positive = log_probs.detach() > ROUNDING
    if mask is not None:
        is_positive &= mask.bool()[..., None]
    if is_positive.any():
        position = first_true(is_positive)
        place = element("log_probs", position)
        row_sum = float(log_probs.detach()[position[:-1]].sum())
        kind = "the row looks like probabilities" if abs(row_sum - 1) < ROUNDING else "a log-probability is at most 0"
        raise ValueError(
            f"{place} is {float(log_probs[position]):.4g}, and {kind}: "
            "pass logits.log_softmax(-1), or the logits to cross_entropy_loss"
        )
