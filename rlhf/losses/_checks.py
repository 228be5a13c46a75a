"""Input checks shared by every loss: one line that names the argument, what was seen and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_value_checks = False


@contextmanager
def checks(enabled: bool = True) -> Iterator[None]:
    """Also check *values* on an accelerator, where reading them waits for the device.

    Shapes, dtypes and hyper-parameters are always checked. Label ranges are always checked on CPU, where it costs
    nothing; elsewhere, and for NaN everywhere, only inside ``with rlhf.losses.checks():``.
    """
    global _value_checks
    before, _value_checks = _value_checks, enabled
    try:
        yield
    finally:
        _value_checks = before


def check_floating(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {value.dtype}: pass log-probabilities or logits")
    if _value_checks and not (finite := value.isfinite()).all():
        where = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(
            f"{name}{list(where)} is {float(value[where])}: look for an overflow or a division by zero upstream"
        )


def check_same_shape(**named: Tensor | None) -> None:
    shapes = {name: tuple(value.shape) for name, value in named.items() if value is not None}
    if len(set(shapes.values())) > 1:
        seen = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes must be equal, got {seen}")


def check_labels(name: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raise unless every label is an index into ``classes`` or ``ignore_index``."""
    if labels.is_floating_point() or labels.dtype is torch.bool:
        raise ValueError(
            f"{name} must hold class indices (integers), got {labels.dtype}: for one-hot rows pass {name}.argmax(-1)"
        )
    if labels.numel() and (labels.device.type == "cpu" or _value_checks):
        wrong = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
        if wrong.any():
            where = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"{name}{list(where)} is {int(labels[where])}, outside the vocabulary [0, {classes}): "
                f"fix the label, or set it to ignore_index ({ignore_index})"
            )


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise unless ``low <= value < high`` (``low < value`` with ``open_low``)."""
    if not (low < value if open_low else low <= value) or not value < high:
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low}, {high}), got {value}")


def check_probabilities(name: str, value: Tensor) -> None:
    """Raise unless all values lie in [0, 1]; like label ranges, read on CPU always and elsewhere on request."""
    if value.numel() and (value.device.type == "cpu" or _value_checks):
        low, high = float(value.detach().min()), float(value.detach().max())
        if low < 0 or high > 1:
            raise ValueError(f"{name} must be probabilities in [0, 1], got values from {low:.4g} to {high:.4g}")
